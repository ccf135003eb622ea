"""What a layer's inputs say about its weights: H = XᵀX, streamed; damping; factors; the error of a pruned weight.

For a linear layer with inputs X [tokens, d_in], the squared error of its outputs under a change of weights is
‖X(W−Ŵ)ᵀ‖² = tr((W−Ŵ) H (W−Ŵ)ᵀ): a quadratic whose Hessian, up to a factor of two, is H = XᵀX for every output row.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers.checks import all_finite, check_hessian, check_matrix, check_percdamp, check_tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products in float32 inside, whatever TF32 or bfloat16 short cuts the user has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class InputStatistics:
    """Raw sums over the tokens that entered a layer. Sums add up across batches and processes; means do not.

    Args:
        d_in: inputs of the layer.
        with_hessian: keep the whole XᵀX; without, only its diagonal (all that Wanda needs).
        dtype: of the sums; float32, or float64 for oracles.
        device: where the sums live; that of the inputs.
    """

    def __init__(
        self,
        d_in: int,
        with_hessian: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokens = 0
        self._factors: dict[float, Factor] = {}
        self._sum = torch.zeros((d_in, d_in) if with_hessian else (d_in,), dtype=dtype, device=device)

    @property
    def hessian(self) -> Float[Tensor, "d_in d_in"]:
        """XᵀX summed over all tokens so far."""
        if self._sum.ndim == 1:
            raise ValueError("these statistics keep only feature norms; collect them with with_hessian=True")
        return self._sum

    @property
    def feature_norm(self) -> Float[Tensor, " d_in"]:
        """‖X_j‖₂ of each input over all tokens so far."""
        return (self._sum if self._sum.ndim == 1 else self._sum.diagonal()).sqrt()

    def factor(self, percdamp: float) -> "Factor":
        """`factorise(self.hessian, percdamp)`, computed once for all layers that see these inputs."""
        check_percdamp(percdamp)
        if percdamp not in self._factors:
            self._factors = {percdamp: factorise(self.hessian, percdamp)}  # one at a time: each is as large as H
        return self._factors[percdamp]

    @full_precision()
    def update(self, inputs: Float[Tensor, "*batch d_in"]) -> None:
        """Add the tokens of one batch.

        Half-precision inputs are converted first: their products are exact in float32.

        Raises:
            ValueError: not tokens of `d_in` floats each; a single token is [1, d_in].
            NonFiniteError: an input is NaN or infinite; nothing is added.
        """
        self._check_inputs(inputs)
        rows = inputs.detach().flatten(0, -2).to(self._sum.dtype)
        added = rows.square().sum(dim=0) if self._sum.ndim == 1 else rows.T @ rows
        # A NaN or an infinity among the inputs shows on the diagonal, which is far smaller than the inputs.
        squares = added if added.ndim == 1 else added.diagonal()
        if not squares.isfinite().all():
            raise NonFiniteError("a layer's inputs are NaN or infinite, or too large for float32 sums")
        self._add(added, len(rows))

    def merge(self, other: "InputStatistics") -> None:
        """Add the sums of another part of the same calibration text.

        Raises:
            ValueError: the other statistics are of another width, or only one of the two keeps a Hessian.
        """
        if other._sum.shape != self._sum.shape:
            raise ValueError(
                f"other: expected sums of shape {tuple(self._sum.shape)} as these are, "
                f"received {tuple(other._sum.shape)}; are both collected with the same with_hessian?"
            )
        self._add(other._sum, other.tokens)

    def _check_inputs(self, inputs: Any) -> None:
        check_tensor("inputs", inputs)
        d_in = self._sum.shape[-1]
        if inputs.ndim < 2 or inputs.shape[-1] != d_in or not inputs.is_floating_point():
            raise ValueError(
                f"inputs: expected floats [..., tokens, {d_in}], received {inputs.dtype} {tuple(inputs.shape)}"
            )

    def _add(self, added: Tensor, tokens: int) -> None:
        self._sum += added
        self.tokens += tokens
        self._factors = {}


@dataclass(frozen=True)
class Factor:
    """A damped Hessian factored from the far end: H + λI = V Vᵀ with V upper triangular.

    Then U = V⁻¹ is the upper Cholesky factor of the inverse, which the published code computes by three cubic steps:
    1 / V_qq = U_qq, so the sweep needs no inverse at all.

    Args:
        V: upper triangular.
        dead: inputs that were zero on all calibration tokens.
    """

    V: Float[Tensor, "d d"]
    dead: Bool[Tensor, " d"]

    def to(self, dtype: torch.dtype) -> "Factor":
        """The same in another precision."""
        return Factor(self.V.to(dtype), self.dead)


def dead_columns(hessian: Float[Tensor, "d d"]) -> Bool[Tensor, " d"]:
    """Inputs that were zero on all calibration tokens."""
    return hessian.diagonal() == 0


@torch.no_grad()
def damped(hessian: Float[Tensor, "d d"], percdamp: float) -> Float[Tensor, "d d"]:
    """H + λI with λ = percdamp · mean(diag H); a dead input gets a unit diagonal first.

    Args:
        hessian: XᵀX summed over calibration tokens, symmetric, in the inputs' units squared.
        percdamp: fraction of the mean diagonal, dimensionless; 0.01 in the paper.

    Returns:
        A new matrix of the same dtype, or float32 for half precision.

    Raises:
        ValueError: not a square float matrix; percdamp is negative or not finite.
        NonFiniteError: the Hessian has NaN or infinite entries, or percdamp is too large for the dtype.
    Source: Frantar & Alistarh 2023, section 3.4 and the published code.
    """
    check_percdamp(percdamp)
    check_hessian(hessian)
    if not all_finite(hessian):
        raise NonFiniteError("the Hessian has NaN or infinite entries; look at the calibration inputs")
    result = hessian.to(working_dtype(hessian), copy=True)
    diagonal = result.diagonal()
    diagonal[dead_columns(hessian)] = 1
    diagonal += float(percdamp) * diagonal.mean()
    if not diagonal.isfinite().all():
        raise NonFiniteError(
            f"the Hessian damped with percdamp {float(percdamp):g}, on a mean diagonal of "
            f"{hessian.diagonal().double().mean():g}, does not fit {result.dtype}; lower percdamp (0.01 is usual)"
        )
    return result


def working_dtype(*tensors: Float[Tensor, "..."]) -> torch.dtype:
    """float32, or float64 where one of the tensors is."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def cholesky(matrix: Float[Tensor, "d d"], percdamp: float, upper: bool = False) -> Float[Tensor, "d d"]:
    """The Cholesky factor of a damped Hessian or of its inverse, or an error with the remedy."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    if info.any():
        raise SingularHessianError(
            f"the Hessian of {len(matrix)} inputs is not positive definite with percdamp {float(percdamp):g}; "
            "raise percdamp (0.01 to 0.1 is usual) or calibrate on more tokens"
        )
    return factor


@torch.no_grad()
@full_precision()
def factorise(hessian: Float[Tensor, "d d"], percdamp: float) -> Factor:
    """Damp the Hessian and factor it once, for any number of layers that see these inputs.

    V = flip(chol(flip(H + λI))), where flip reverses the order of the inputs.

    Args:
        hessian: XᵀX summed over calibration tokens.
        percdamp: see `damped`.

    Raises:
        ValueError, NonFiniteError: see `damped`.
        SingularHessianError: not positive definite even so; a larger percdamp or more tokens are the remedy.
    """
    lower = cholesky(damped(hessian, percdamp).flip(0, 1), percdamp)
    return Factor(lower.flip(0, 1), dead_columns(hessian))


@torch.no_grad()
@full_precision()
def layer_error(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> float:
    """Squared error of the layer's outputs on its calibration inputs, tr((W−Ŵ) H (W−Ŵ)ᵀ).

    Args:
        weight: the dense weight W.
        pruned: the weight Ŵ that takes its place.
        hessian: undamped XᵀX.

    Raises:
        ValueError: shapes do not match.
        NonFiniteError: a tensor has NaN or infinite entries, or the error is too large for the tensors' precision.
    """
    check_matrix("weight", weight)
    check_matrix("pruned", pruned)
    check_hessian(hessian, weight)
    if pruned.shape != weight.shape:
        raise ValueError(f"pruned: expected the weight's shape {tuple(weight.shape)}, received {tuple(pruned.shape)}")
    dtype = working_dtype(weight, pruned, hessian)
    difference = weight.to(dtype) - pruned.to(dtype)
    error = float(((difference @ hessian.to(dtype)) * difference).sum(dtype=torch.float64))
    if not math.isfinite(error):
        raise NonFiniteError(
            f"the outputs' squared error or energy is {error}: a weight or the Hessian has NaN or infinite entries, "
            f"or values too large for {dtype}; look at the weights and at the calibration inputs"
        )
    return error


def relative_error(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> float:
    """`layer_error` as a fraction of tr(W H Wᵀ), the energy of the dense layer's outputs.

    NaN where those outputs are all zero.

    Raises:
        ValueError, NonFiniteError: see `layer_error`.
    """
    energy = layer_error(weight, torch.zeros_like(weight), hessian)
    return layer_error(weight, pruned, hessian) / energy if energy else math.nan
