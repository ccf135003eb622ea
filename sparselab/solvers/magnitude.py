"""Magnitude pruning: the smallest weights go. No data, no compensation: the baseline of every paper."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.solvers.checks import check_weight
from sparselab.solvers.hessian import working_dtype
from sparselab.solvers.sparsity import NM, Pattern, parse_sparsity, survivors


@torch.no_grad()
def magnitude(weight: Float[Tensor, "d_out d_in"], sparsity: float | str | Pattern) -> Float[Tensor, "d_out d_in"]:
    """Prune the weights of smallest |W|: over the whole layer, or within each N:M group.

    Args:
        weight: [d_out, d_in]; not modified.
        sparsity: 0.5, "50%", "2:4" or a pattern.

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · size)` entries pruned.

    Raises:
        ValueError: wrong sparsity, or M does not divide d_in.
        NonFiniteError: the weight has NaN or infinite entries.
    Source: Zhu & Gupta 2017; the layer-wise baseline of Frantar & Alistarh 2023.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    scores = weight.abs().to(working_dtype(weight))
    keep = survivors(scores if isinstance(pattern, NM) else scores.flatten(), pattern)
    return weight.masked_fill(~keep.view_as(weight), 0)
