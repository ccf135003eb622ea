"""RIA: how much of its input's and of its output's weight each weight is, times the input's norm, softened."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.solvers.checks import check_feature_norm, check_weight
from sparselab.solvers.hessian import working_dtype
from sparselab.solvers.sparsity import NM, Pattern, parse_sparsity, survivors

_POWER = 0.5  # of the input's norm, as in the paper


@torch.no_grad()
def ria(
    weight: Float[Tensor, "d_out d_in"], feature_norm: Float[Tensor, " d_in"], sparsity: float | str | Pattern
) -> Float[Tensor, "d_out d_in"]:
    """Prune the lowest (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · √‖X_j‖₂ of the layer, or within each N:M group.

    Args:
        weight: [d_out, d_in]; not modified.
        feature_norm: ‖X_j‖₂ of each input over the calibration tokens.
        sparsity: 0.5, "50%", "2:4" or a pattern.

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · size)` entries pruned, or M − N of each group.

    Raises:
        ValueError: wrong sparsity or shapes, a negative norm, or M does not divide d_in.
        NonFiniteError: the weight or the norms have NaN or infinite entries.
    Source: Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models
        (relative importance and activations; without its permutation of channels), and its published code.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    check_feature_norm(weight, feature_norm)
    sizes = weight.abs().to(working_dtype(weight))
    # A row or a column of zeros has no shares; its weights are the first to go whatever they are divided by.
    least = torch.finfo(sizes.dtype).tiny
    shares = sizes / sizes.sum(dim=0).clamp(min=least) + sizes / sizes.sum(dim=1, keepdim=True).clamp(min=least)
    scores = shares * feature_norm.to(sizes.dtype) ** _POWER
    keep = survivors(scores if isinstance(pattern, NM) else scores.flatten(), pattern)
    return weight.masked_fill(~keep.view_as(weight), 0)
