"""The best weights for a given mask, exactly or nearly: how well they could do, whatever the method that chose them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import SingularHessianError
from sparselab.solvers.checks import as_number, check_hessian, check_keep, check_weight, check_whole, fitted
from sparselab.solvers.hessian import damped, full_precision, layer_error, working_dtype

# Memory of the stacked systems of some rows, in float64 elements: 256 MiB.
_ELEMENTS_AT_ONCE = 2**25
# How far conjugate gradients go for the least error. On the bundled model, whose first block is as badly conditioned
# as they come (180 steps), this finds every layer's within 1.1%; most are there after 15 to 40 steps.
_GAP_TOLERANCE, _GAP_STEPS = 3e-3, 300
_DELAY = 10  # steps over which the fall of the error is looked at, as it is uneven from one to the next


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


class Refined(NamedTuple):
    """What conjugate gradients have come to.

    Args:
        weight: [d_out, d_in], zero outside the mask.
        residual: how far the kept weights are from their optimum: norm of the error's gradient, divided by its norm
            where all weights are zero; 0 at the optimum.
    """

    weight: Float[Tensor, "d_out d_in"]
    residual: float


@torch.no_grad()
def refine(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    keep: Bool[Tensor, "d_out d_in"],
    start: Float[Tensor, "d_out d_in"] | None = None,
    steps: int = 20,
    tolerance: float = 0.0,
) -> Refined:
    """Move kept weights towards the optimum of `reconstruct`: conjugate gradients on H_kk ŵ_k = (H w)_k, row by row.

    Each step takes one product with H for all rows together, and lowers the layer error of every row that is not at its
    optimum yet. The diagonal of H is the preconditioner.

    Args:
        weight: the dense weight; not modified.
        hessian: XᵀX over the calibration tokens; `damped(hessian, percdamp)` gives the optimum of the damped problem.
        keep: True where a weight survives.
        start: a pruned weight to begin with, such as SparseGPT's; None begins with the dense weight under the mask.
        steps: of the iteration, at most; 0 changes nothing.
        tolerance: stop once the last ten steps have together lowered the layer error by no more than this share of
            what is left; 0 takes all steps, and on a GPU waits for none of them.

    Returns:
        A new weight of the weight's dtype, and its residual before it was rounded to that.

    Raises:
        ValueError, TypeError: shapes or kinds do not match, or steps or tolerance is negative.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries, or the result does not fit the dtype.
    Source: Meng et al. 2024 (ALPS), the refinement of a given mask; preconditioned as in any textbook. When to stop:
        Hestenes & Stiefel 1952, theorem 6:1 (what a step takes off the error is known without computing it).
    """
    check_weight(weight)
    check_hessian(hessian, weight)
    check_keep(weight, keep)
    check_whole("steps", steps, 0)
    if not 0 <= as_number("tolerance", tolerance) < math.inf:  # NaN fails too
        raise ValueError(f"tolerance: expected a finite number ≥ 0, received {tolerance!r:.40}")
    dtype = working_dtype(weight, hessian)
    W, H = weight.to(dtype), damped(hessian.to(dtype), 0.0)  # only dead inputs are touched
    X = (weight if start is None else start).to(dtype) * keep
    with full_precision():
        gradient = (W - X) @ H
        error = float(((W - X) * gradient).sum()) if tolerance else 0.0
        X, R = _conjugate_gradients(H, X, gradient * keep, keep, steps, error, tolerance)
        whole = float(((W @ H) * keep).norm())
    return Refined(fitted(X, weight.dtype), float(R.norm()) / whole if whole else 0.0)


class Gap(NamedTuple):
    """How far pruned weights are from the best ones under their mask.

    Args:
        gap: layer error over that of the best weights; infinite where these have none, NaN where no weight was changed.
        residual: of the best weights, see `Refined`.
    """

    gap: float
    residual: float


def optimality_gap(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> Gap:
    """The layer error of a pruned weight over the least that any weight with the same zeros has; 1 is the best.

    The best is found by `refine`, from the pruned weight on; where that does not come all the way, the gap is larger.

    Args:
        weight, pruned: the dense weight, and what took its place.
        hessian: undamped XᵀX over the calibration tokens. With fewer tokens than kept inputs the least is zero.

    Raises:
        ValueError, TypeError, NonFiniteError: see `refine` and `layer_error`.
    Source: Frantar & Alistarh 2023, section 4 (the error of SparseGPT beside that of exact reconstruction).
    """
    if not bool((weight != pruned).any()):
        return Gap(math.nan, math.nan)
    whole = weight.to(working_dtype(weight))  # the best is not rounded to half precision
    best = refine(whole, hessian, pruned != 0, pruned, _GAP_STEPS, _GAP_TOLERANCE)
    error, least = layer_error(weight, pruned, hessian), layer_error(weight, best.weight, hessian)
    return Gap(error / least if least else math.inf if error else math.nan, best.residual)


def _conjugate_gradients(
    H: Float[Tensor, "d d"],
    X: Float[Tensor, "rows d"],
    R: Float[Tensor, "rows d"],
    keep: Bool[Tensor, "rows d"],
    steps: int,
    error: float,
    tolerance: float,
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
    inverse = 1 / H.diagonal()
    P = R * inverse
    rho = (R * P).sum(dim=1, keepdim=True)
    least = rho * torch.finfo(H.dtype).eps ** 2  # where rounding is all that is left, a row stays as it is
    nothing = error * torch.finfo(H.dtype).eps
    falls: list[float] = []
    for _ in range(steps):
        left = error - sum(falls)
        if len(falls) >= _DELAY and (left <= nothing or sum(falls[-_DELAY:]) <= tolerance * left):
            break
        Q = (P @ H) * keep
        curvature = (P * Q).sum(dim=1, keepdim=True)
        going = (rho > least) & (curvature > 0)
        step = torch.where(going, rho / curvature, 0)
        X, R = X + step * P, R - step * Q
        if tolerance:
            falls.append(float((step * rho).sum()))
        before, rho = rho, (R * R * inverse).sum(dim=1, keepdim=True)
        P = R * inverse + torch.where(going, rho / before, 0) * P
    return X, R
