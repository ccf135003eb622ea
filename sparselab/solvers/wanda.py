"""Wanda: weights times the norm of what they multiply. One pass over the data, no compensation."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.solvers.checks import check_feature_norm, check_weight
from sparselab.solvers.hessian import working_dtype
from sparselab.solvers.sparsity import Pattern, parse_sparsity, survivors


@torch.no_grad()
def wanda(
    weight: Float[Tensor, "d_out d_in"], feature_norm: Float[Tensor, " d_in"], sparsity: float | str | Pattern
) -> Float[Tensor, "d_out d_in"]:
    """Prune the lowest |W_ij| · ‖X_j‖₂ of each output row, or within each N:M group of a row.

    Args:
        weight: [d_out, d_in]; not modified.
        feature_norm: ‖X_j‖₂ of each input over the calibration tokens.
        sparsity: 0.5, "50%", "2:4" or a pattern.

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · d_in)` entries of each row pruned.

    Raises:
        ValueError: wrong sparsity or shapes, a negative norm, or M does not divide d_in.
        NonFiniteError: the weight or the norms have NaN or infinite entries.
    Source: Sun et al. 2023, equation 1.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    check_feature_norm(weight, feature_norm)
    keep = survivors(weight.abs().to(working_dtype(weight)) * feature_norm, pattern)
    return weight.masked_fill(~keep, 0)
