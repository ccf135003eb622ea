"""What the solvers ask of their arguments before they start, and of their answers before they hand them out.

Each failure says what was expected and what came. Arguments are `Any` here: these functions are what makes sure.
"""

import math
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.errors import NonFiniteError


def check_tensor(name: str, value: Any) -> None:
    """A tensor, or a TypeError; numbers of any kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, received {type(value).__name__}")


def check_matrix(name: str, value: Any) -> None:
    """A float matrix [d_out, d_in], or an error."""
    check_tensor(name, value)
    if value.ndim != 2 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a float matrix [d_out, d_in], received {value.dtype} {tuple(value.shape)}")


def all_finite(tensor: Float[Tensor, "..."]) -> bool:
    """Whether no entry is NaN or infinite; by the extremes, which takes no memory and a twentieth of the time."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach()))


def check_weight(weight: Any) -> None:
    """A matrix of finite floats, or an error."""
    check_matrix("weight", weight)
    if not all_finite(weight):
        raise NonFiniteError("the weight has NaN or infinite entries; the model was damaged before pruning")


def check_hessian(hessian: Any, weight: Float[Tensor, "d_out d_in"] | None = None) -> None:
    """A square float matrix, of the weight's inputs where a weight is given, or an error."""
    check_matrix("hessian", hessian)
    d_in = len(hessian) if weight is None else weight.shape[1]
    if hessian.shape != (d_in, d_in):
        fitting = "" if weight is None else " for this weight"
        raise ValueError(f"hessian: expected shape {(d_in, d_in)}{fitting}, received {tuple(hessian.shape)}")


def check_feature_norm(weight: Float[Tensor, "d_out d_in"], feature_norm: Any) -> None:
    """One finite float from 0 on for each input of the weight, or an error."""
    check_tensor("feature_norm", feature_norm)
    if feature_norm.shape != weight.shape[1:] or not feature_norm.is_floating_point():
        raise ValueError(
            f"feature_norm: expected {weight.shape[1]} norms, "
            f"received shape {tuple(feature_norm.shape)} of {feature_norm.dtype}"
        )
    if not feature_norm.isfinite().all():
        raise NonFiniteError("feature_norm has NaN or infinite entries; look at the calibration inputs")
    if (feature_norm < 0).any():
        raise ValueError(f"feature_norm: expected norms ≥ 0, received {feature_norm.min():g}")


def check_keep(weight: Float[Tensor, "d_out d_in"], keep: Any) -> None:
    """A boolean mask of the weight's shape, or an error."""
    check_tensor("keep", keep)
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected a mask of torch.bool, received {keep.dtype}")
    if keep.shape != weight.shape:
        raise ValueError(f"keep: expected a mask of shape {tuple(weight.shape)}, received {tuple(keep.shape)}")


def as_number(name: str, value: Any) -> float:
    """A float of a number of whatever library; infinite where no float is large enough."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, received {type(value).__name__} {value!r:.40}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError) as error:  # arrays and tensors of several elements
        raise TypeError(f"{name}: expected a number, received {type(value).__name__}: {error}") from error


def check_whole(name: str, value: Any, least: float = -math.inf) -> None:
    """A whole number that is large enough, or an error."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, received {type(value).__name__} {value!r:.40}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, received {value}")


def check_percdamp(percdamp: Any) -> None:
    """A finite number from 0 on, or an error."""
    if not 0 <= as_number("percdamp", percdamp) < math.inf:  # NaN fails too
        raise ValueError(f"percdamp: expected a finite number ≥ 0, received {percdamp!r:.40}")


def check_blocksize(blocksize: Any) -> None:
    """At least one column, or an error."""
    check_whole("blocksize", blocksize, 1)


def fitted(compensated: Float[Tensor, "d_out d_in"], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """A compensated weight in the layer's own dtype, or an error where it does not fit."""
    result = compensated.to(dtype)
    if not all_finite(result):
        raise NonFiniteError(
            f"the compensated weight does not fit {dtype}; raise percdamp, or load the model in bfloat16 or float32"
        )
    return result
