"""The exact optimum for a given mask: how well the surviving weights could do, whatever the method that chose them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import SingularHessianError
from sparselab.solvers.checks import check_hessian, check_keep, check_weight, fitted
from sparselab.solvers.hessian import damped

# Memory of the stacked systems of some rows, in float64 elements: 256 MiB.
_ELEMENTS_AT_ONCE = 2**25


@torch.no_grad()
def reconstruct(
    weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"], keep: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """The weight of smallest layer error among all that are zero outside the mask.

    Each row is a least-squares problem of its own: H_kk ŵ_k = (H w)_k on the kept inputs k. Solved in float64.

    Args:
        weight: [d_out, d_in]; not modified.
        hessian: XᵀX over the calibration tokens; `damped(hessian, percdamp)` gives the optimum of the damped problem.
        keep: True where a weight survives.

    Returns:
        A new weight of the same dtype, zero outside the mask. Weights of dead inputs stay as they are.

    Raises:
        ValueError: shapes do not match.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries, or the result does not fit the dtype.
        SingularHessianError: too few tokens for a unique optimum; damp the Hessian first.
    Source: Frantar & Alistarh 2023, section 3.1 (the masked least-squares problem).
    """
    check_weight(weight)
    check_hessian(hessian, weight)
    check_keep(weight, keep)
    H = damped(hessian.double(), 0.0)  # only dead inputs are touched
    target = weight.double() @ H
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, H.numel()))
    parts = [_solve_rows(H, b, k) for b, k in zip(target.split(rows), keep.split(rows), strict=True)]
    return fitted(torch.cat(parts), weight.dtype)


def _solve_rows(
    H: Float[Tensor, "d d"], target: Float[Tensor, "rows d"], keep: Bool[Tensor, "rows d"]
) -> Float[Tensor, "rows d"]:
    # Pruned inputs get a unit row and column and a zero on the right: they drop out of the system, and of the answer.
    both = keep[:, :, None] & keep[:, None, :]
    systems = torch.where(both, H, torch.eye(len(H), dtype=H.dtype, device=H.device))
    lower, info = torch.linalg.cholesky_ex(systems)
    if info.any():
        raise SingularHessianError(
            "the Hessian of the kept inputs is singular, so the optimum is not unique; "
            "pass damped(hessian, percdamp), or calibrate on more tokens"
        )
    return torch.cholesky_solve((target * keep)[:, :, None], lower)[:, :, 0] * keep
