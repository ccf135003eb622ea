"""OWL: blocks with more outlying scores are pruned less. An allocation, for any method to prune by."""

from typing import Any

import torch
from transformers import PreTrainedModel

from sparselab.allocation import Allocation, Rule, parse_allocation
from sparselab.calibration import advance_streams, enter, observe
from sparselab.models.blocks import Decoder, evaluating, find_linears, read_weight
from sparselab.models.inputs import check_tokens
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress, tracked
from sparselab.solvers import Pattern, Unstructured
from sparselab.solvers.checks import as_number


def owl(
    model: PreTrainedModel | StreamedModel,
    calib: Any,
    sparsity: float | str | Pattern | Allocation,
    threshold: float = 5.0,
    spread: float = 0.08,
    batch_size: int | None = None,
    progress: Progress = True,
) -> Allocation:
    """A sparsity for each block: lower, the more of its scores |W_ij|·‖X_j‖₂ are above `threshold` times their mean.

    The shares of outliers are scaled to a width of 2 · spread, turned about and shifted so that the mean over blocks is
    the sparsity asked for. Measured on the dense model, in one pass.

    Args:
        model, calib, batch_size, progress: see `prune`.
        sparsity: the mean, 0.7 or "70%".
        threshold: M of the paper, which takes 5 or 7.
        spread: λ of the paper, which takes 0.08.

    Returns:
        Rules for `prune(model, calib, sparsity=…)`, one a block, to four digits, so that they can be typed.

    Raises:
        ValueError: N:M, a spread that leaves the range from 0 to 1, or a threshold that is not positive.
        SparselabError: see `prune`.
    Source: Yin et al. 2024, Outlier Weighed Layerwise Sparsity; the mean is over the scores of a whole block, as in the
        published code.
    """
    pattern = parse_allocation(sparsity)
    if not isinstance(pattern, Unstructured):
        raise ValueError(f"sparsity: expected a fraction, received {pattern}; OWL gives each block its own")
    if not as_number("threshold", threshold) > 0 or not 0 <= as_number("spread", spread) <= 0.5:
        raise ValueError(f"threshold, spread: expected above 0, and from 0 to 0.5; received {threshold}, {spread}")
    shares = torch.tensor(_outliers(Decoder(model), calib, threshold, batch_size, progress), dtype=torch.float64)
    width = float(shares.max() - shares.min())
    scaled = (shares - shares.min()) * (2 * spread / width if width else 0.0)
    fractions = pattern.fraction - (scaled - scaled.mean())
    if not (fractions.min() >= 0 and fractions.max() <= 1):
        raise ValueError(
            f"spread: expected one that leaves all sparsities from 0 to 1, received {spread}, which gives "
            f"{float(fractions.min()):.3f} to {float(fractions.max()):.3f}"
        )
    rules = [Rule(str(index), Unstructured(round(fraction, 4))) for index, fraction in enumerate(fractions.tolist())]
    return Allocation(tuple(rules))


def _outliers(
    decoder: Decoder, calib: Any, threshold: float, batch_size: int | None, progress: Progress
) -> list[float]:
    """For each block, the share of its weights whose scores are above `threshold` times the mean."""
    shares = []
    windows = check_tokens(decoder, calib)
    with evaluating(decoder.model), tracked(progress, len(decoder.blocks), "outliers", "block") as advance:
        streams = enter(decoder, windows, batch_size)
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as block:
                seen = observe(decoder, index, streams, with_hessian=False, foresee=True)
                scores = torch.cat(
                    [
                        (read_weight(linear).abs().float() * seen[name].feature_norm).flatten()
                        for name, linear in find_linears(block).items()
                    ]
                )
                shares.append(float((scores > threshold * scores.mean()).double().mean()))
                advance_streams(decoder, index, streams, foreseen=True)
            advance(1)
    return shares
