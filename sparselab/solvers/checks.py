"""What the solvers ask of their tensors before they start; each failure says what was expected and what came."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import NonFiniteError


def check_weight(weight: Float[Tensor, "..."]) -> None:
    """A matrix of finite floats, or an error."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a float matrix [d_out, d_in], received {weight.dtype} {tuple(weight.shape)}"
        )
    if not weight.isfinite().all():
        raise NonFiniteError("the weight has NaN or infinite entries; the model was damaged before pruning")


def check_hessian(weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "..."]) -> None:
    """A square matrix of the weight's inputs, or an error."""
    d_in = weight.shape[1]
    if hessian.shape != (d_in, d_in):
        raise ValueError(f"hessian: expected shape {(d_in, d_in)} for this weight, received {tuple(hessian.shape)}")


def check_keep(weight: Float[Tensor, "d_out d_in"], keep: Bool[Tensor, "..."]) -> None:
    """A boolean mask of the weight's shape, or an error."""
    if keep.shape != weight.shape:
        raise ValueError(f"keep: expected a mask of shape {tuple(weight.shape)}, received {tuple(keep.shape)}")


def check_percdamp(percdamp: float) -> None:
    """A finite number from 0 on, or an error."""
    if not (math.isfinite(percdamp) and percdamp >= 0):
        raise ValueError(f"percdamp: expected a finite number ≥ 0, received {percdamp}")


def check_blocksize(blocksize: int) -> None:
    """At least one column, or an error."""
    if blocksize < 1:
        raise ValueError(f"blocksize: expected at least 1, received {blocksize}")
