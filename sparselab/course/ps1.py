"""Problem set 1, masks and scores: what is wrong with an answer, exercise by exercise.

Each check takes the student's function and returns a line to show once all is well. Other seeds try other numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.course.answers import Answer, CheckError
from sparselab.course.values import as_mask, check_group, kind, normal, tied

_SPARSITIES = (0.5, 0.3, 0.0, 1.0, 0.77)


def magnitude_mask(function: Callable[..., Any], seed: int = 0) -> str:
    """`magnitude_mask(weight, sparsity)`: True where a weight of the layer survives.

    Raises:
        CheckError: not a mask, not `round(sparsity · size)` pruned, or not the smallest of them.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for weight in (normal(draw, 8, 8), normal(draw, 5, 7), tied(draw, 6, 9), torch.ones(4, 4)):
        for sparsity in _SPARSITIES:
            keep = as_mask(answer, answer(weight, sparsity), weight)
            check_group(answer.name, "the layer", weight.abs(), keep, round(sparsity * weight.numel()))
    return f"{answer.name}: exact counts, also under ties, and the smallest go."


def global_magnitude_masks(function: Callable[..., Any], seed: int = 0) -> str:
    """`global_magnitude_masks(weights, sparsity)`: one mask a layer, all layers competing with each other.

    Raises:
        CheckError: not such masks; layers that each lose the same fraction are told from layers that compete.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    layers = [normal(draw, 6, 8), 10 * normal(draw, 4, 8), tied(draw, 8, 3)]
    for weights in (layers, layers[:1], [torch.ones(3, 4), torch.ones(2, 4)]):
        for sparsity in _SPARSITIES:
            masks = answer(weights, sparsity)
            if not isinstance(masks, list | tuple) or len(masks) != len(weights):
                raise CheckError(f"{answer.name} returns {kind(masks)}, expected a list of {len(weights)} masks")
            keep = [as_mask(answer, *pair) for pair in zip(masks, weights, strict=True)]
            together = torch.cat([mask.flatten() for mask in keep])
            scores = torch.cat([weight.abs().flatten() for weight in weights])
            fractions = {round(1 - mask.float().mean().item(), 2) for mask in keep}
            hint = " (every layer loses the same fraction: let all compete)" if len(keep) > len(fractions) == 1 else ""
            check_group(answer.name, f"all layers{hint}", scores, together, round(sparsity * len(scores)))
    return f"{answer.name}: one competition over all layers, exact counts."


def nm_mask(function: Callable[..., Any], seed: int = 0) -> str:
    """`nm_mask(scores, n, m)`: the n largest of every m consecutive entries of a row survive.

    Raises:
        CheckError: a group keeps another number, or not its largest.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for n, m in ((2, 4), (1, 4), (4, 8), (0, 4), (4, 4)):
        for scores in (normal(draw, 4, 16).abs(), tied(draw, 6, 8).abs(), torch.zeros(2, 8)):
            keep = as_mask(answer, answer(scores, n, m), scores)
            groups = zip(scores.reshape(-1, m), keep.reshape(-1, m), strict=True)
            for number, (score, kept) in enumerate(groups):
                row, first = divmod(number * m, scores.shape[1])
                place = f"row {row}, inputs {first} to {first + m - 1}"
                check_group(f"{answer.name} at {n}:{m}", place, score, kept, m - n)
    return f"{answer.name}: n of every m consecutive inputs stay, the largest ones."


def feature_norms(function: Callable[..., Any], seed: int = 0) -> str:
    """`feature_norms(model, name, batches)`: ‖X_j‖₂ of each input of the layer of that name, over all tokens.

    Raises:
        CheckError: other norms; they depend on how tokens are split into batches; a hook stays behind.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)).requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.copy_(normal(draw, *parameter.shape))
    tokens = normal(draw, 6, 5, 6)
    inputs = {"0": tokens, "2": model[:2](tokens)}
    for name, seen in inputs.items():
        expected = seen.reshape(-1, seen.shape[-1]).double().norm(dim=0)
        for split in ([6], [2, 4], [1, 1, 1, 3]):
            norms = answer(model, name, list(tokens.split(split)))
            place = f"layer {name}, batches of {split}"
            if not isinstance(norms, Tensor) or norms.shape != expected.shape:
                raise CheckError(f"{answer.name} returns {kind(norms)}, expected [{len(expected)}]: one norm an input")
            if not torch.allclose(norms.double(), expected, rtol=1e-4):
                raise CheckError(f"{answer.name}, {place}: {_wrong_norm(norms.double(), expected, seen)}")
        hooks = [layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules()]
        if any(hooks):
            raise CheckError(
                f"{answer.name} leaves a hook on the model; call its remove() when all batches are through"
            )
    return f"{answer.name}: the same norms however tokens are split, and no hook left."


def wanda_mask(function: Callable[..., Any], seed: int = 0) -> str:
    """`wanda_mask(weight, feature_norm, sparsity)`: within each row, the largest |W_ij| · ‖X_j‖ survive.

    Raises:
        CheckError: a row loses another number than `round(sparsity · d_in)`, or not its smallest scores.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    shapes = ((8, 8), (5, 12), (3, 7))
    cases = [(normal(draw, *shape), normal(draw, shape[1]).abs() + 0.1) for shape in shapes]
    cases += [(tied(draw, 6, 10), torch.ones(10)), (torch.ones(4, 6), torch.zeros(6))]
    for weight, norm in cases:
        for sparsity in _SPARSITIES:
            keep = as_mask(answer, answer(weight, norm, sparsity), weight)
            scores = weight.abs() * norm
            for row in range(len(weight)):
                check_group(answer.name, f"row {row}", scores[row], keep[row], round(sparsity * weight.shape[1]))
    return f"{answer.name}: every row loses the same number, its smallest scores."


def perplexity(function: Callable[..., Any], seed: int = 0) -> str:
    """`perplexity(batches)`: exp of the mean loss per predicted token; a batch is (logits, tokens, mask).

    Raises:
        CheckError: another number, with a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    batches = []
    for rows, lengths in ((2, (7, 3)), (3, (2, 7, 5)), (1, (4,))):
        logits = 3 * normal(draw, rows, 7, 11)
        tokens = torch.randint(0, 11, (rows, 7), generator=draw)
        mask = torch.arange(7) < torch.tensor(lengths)[:, None]
        batches.append((logits, tokens, mask.long()))
    whole = [(logits, tokens, torch.ones_like(tokens)) for logits, tokens, _ in batches]
    for case, given in (("without padding", whole), ("with padding", batches), ("one batch", batches[:1])):
        expected, got = _perplexity(given), answer(given)
        if not isinstance(got, float | int | Tensor) or not math.isclose(float(got), expected, rel_tol=1e-4):
            raise CheckError(f"{answer.name}, {case}: {_wrong_perplexity(got, expected, given)}")
    return f"{answer.name}: shifted by one, padding left out, every token counts alike."


def _wrong_norm(norms: Tensor, expected: Tensor, seen: Tensor) -> str:
    column = int((norms - expected).abs().argmax())
    count = seen.numel() // seen.shape[-1]
    ratio = (norms / expected).nan_to_num()
    hints = {math.sqrt(1 / count): "the mean square is taken: Wanda sums", 1 / count: "divided by the number of tokens"}
    reason = next(
        (f" ({hint})" for factor, hint in hints.items() if torch.allclose(ratio, ratio.new_tensor(factor))), ""
    )
    if torch.allclose(norms, expected**2, rtol=1e-4):
        reason = " (the square root is missing)"
    return f"input {column} has norm {norms[column]:.4g}, expected {expected[column]:.4g}{reason}"


def _perplexity(batches: list[tuple[Tensor, Tensor, Tensor]], shift: int = 1, mean_of_means: bool = False) -> float:
    sums, counts = [], []
    for logits, tokens, mask in batches:
        positions = logits[:, : tokens.shape[1] - shift].double().log_softmax(-1)
        nll = -positions.gather(-1, tokens[:, shift:, None])[..., 0] * mask[:, shift:]
        sums.append(nll.sum().item())
        counts.append(mask[:, shift:].sum().item())
    if mean_of_means:
        return math.exp(sum(nll / count for nll, count in zip(sums, counts, strict=True)) / len(sums))
    return math.exp(sum(sums) / sum(counts))


def _wrong_perplexity(got: Any, expected: float, batches: list[tuple[Tensor, Tensor, Tensor]]) -> str:
    if not isinstance(got, float | int | Tensor):
        return f"returns {kind(got)}, expected a number"
    unmasked = [(logits, tokens, torch.ones_like(mask)) for logits, tokens, mask in batches]
    guesses = {
        "logits at a position predict the *next* token": _perplexity(batches, shift=0),
        "batches have different numbers of tokens, and every token counts alike": _perplexity(
            batches, mean_of_means=True
        ),
        "padding counts as well": _perplexity(unmasked),
        "exp is missing": math.log(expected),
    }
    reason = next(
        (f": {guess}" for guess, value in guesses.items() if math.isclose(float(got), value, rel_tol=1e-4)), ""
    )
    return f"perplexity {float(got):.4f}, expected {expected:.4f}{reason}"
