"""What a layer's inputs say about its weights: H = XᵀX, streamed; damping; factors; the error of a pruned weight.

For a linear layer with inputs X [tokens, d_in], the squared error of its outputs under a change of weights is
‖X(W−Ŵ)ᵀ‖² = tr((W−Ŵ) H (W−Ŵ)ᵀ): a quadratic whose Hessian, up to a factor of two, is H = XᵀX for every output row.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers.checks import check_percdamp


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
        if percdamp not in self._factors:
            self._factors = {percdamp: factorise(self.hessian, percdamp)}  # one at a time: each is as large as H
        return self._factors[percdamp]

    @full_precision()
    def update(self, inputs: Float[Tensor, "*batch d_in"]) -> None:
        """Add the tokens of one batch.

        Half-precision inputs are converted first: their products are exact in float32.

        Raises:
            NonFiniteError: an input is NaN or infinite; nothing is added.
        """
        rows = inputs.detach().flatten(0, -2).to(self._sum.dtype)
        added = rows.square().sum(dim=0) if self._sum.ndim == 1 else rows.T @ rows
        # A NaN or an infinity among the inputs shows on the diagonal, which is far smaller than the inputs.
        squares = added if added.ndim == 1 else added.diagonal()
        if not squares.isfinite().all():
            raise NonFiniteError("a layer's inputs are NaN or infinite, or too large for float32 sums")
        self._add(added, len(rows))

    def merge(self, other: "InputStatistics") -> None:
        """Add the sums of another part of the same calibration text."""
        self._add(other._sum, other.tokens)

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


def dead_columns(hessian: Float[Tensor, "d d"]) -> Bool[Tensor, " d"]:
    """Inputs that were zero on all calibration tokens."""
    return hessian.diagonal() == 0


def damped(hessian: Float[Tensor, "d d"], percdamp: float) -> Float[Tensor, "d d"]:
    """H + λI with λ = percdamp · mean(diag H); a dead input gets a unit diagonal first.

    Args:
        hessian: XᵀX summed over calibration tokens, symmetric, in the inputs' units squared.
        percdamp: fraction of the mean diagonal, dimensionless; 0.01 in the paper.

    Raises:
        ValueError: percdamp is negative or not finite.
    Source: Frantar & Alistarh 2023, section 3.4 and the published code.
    """
    check_percdamp(percdamp)
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[dead_columns(hessian)] = 1
    diagonal += percdamp * diagonal.mean()
    return result


@full_precision()
def factorise(hessian: Float[Tensor, "d d"], percdamp: float) -> Factor:
    """Damp the Hessian and factor it once, for any number of layers that see these inputs.

    V = flip(chol(flip(H + λI))), where flip reverses the order of the inputs.

    Args:
        hessian: XᵀX summed over calibration tokens.
        percdamp: see `damped`.

    Raises:
        NonFiniteError: the Hessian has NaN or infinite entries.
        SingularHessianError: not positive definite even so; a larger percdamp or more tokens are the remedy.
    """
    if not hessian.isfinite().all():
        raise NonFiniteError("the Hessian has NaN or infinite entries; look at the calibration inputs")
    lower, info = torch.linalg.cholesky_ex(damped(hessian, percdamp).flip(0, 1))
    if info.any():
        raise SingularHessianError(
            f"the Hessian of {len(hessian)} inputs is not positive definite with percdamp {percdamp:g}; "
            "raise percdamp (0.01 to 0.1 is usual) or calibrate on more tokens"
        )
    return Factor(lower.flip(0, 1), dead_columns(hessian))


@full_precision()
def layer_error(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> float:
    """Squared error of the layer's outputs on its calibration inputs, tr((W−Ŵ) H (W−Ŵ)ᵀ).

    Args:
        weight: the dense weight W.
        pruned: the weight Ŵ that takes its place.
        hessian: undamped XᵀX.
    """
    difference = weight.to(hessian.dtype) - pruned.to(hessian.dtype)
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def relative_error(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> float:
    """`layer_error` as a fraction of tr(W H Wᵀ), the energy of the dense layer's outputs.

    NaN where those outputs are all zero.
    """
    energy = layer_error(weight, torch.zeros_like(weight), hessian)
    return layer_error(weight, pruned, hessian) / energy if energy else math.nan
