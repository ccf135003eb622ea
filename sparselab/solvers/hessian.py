"""What a layer's inputs say about its weights: H = XᵀX, streamed; damping; factors; the error of a pruned weight.

For a linear layer with inputs X [tokens, d_in], the squared error of its outputs under a change of weights is
‖X(W−Ŵ)ᵀ‖² = tr((W−Ŵ) H (W−Ŵ)ᵀ): a quadratic whose Hessian, up to a factor of two, is H = XᵀX for every output row.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers.checks import all_finite, check_hessian, check_matrix, check_percdamp, check_tensor

# Columns of the Hessian that are summed, and columns of its factor that are found, in one product on the CPU. As many
# as the usual block of the sweep, which then finds the inverses of its corners at hand.
PANEL = 128


def _panel_width(device: torch.device) -> int:
    """Columns at a time: a GPU wants more of them."""
    return PANEL if device.type == "cpu" else 8 * PANEL


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products in float32 inside, whatever TF32 or bfloat16 short cuts the user has allowed.

    Asked library by library: the older `torch.get_float32_matmul_precision` fails where a user has allowed them so.
    """
    libraries: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


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
        self._upper_only = False
        with torch.inference_mode(False):  # whose tensors could not be added to outside of it
            self._sum = torch.zeros((d_in, d_in) if with_hessian else (d_in,), dtype=dtype, device=device)

    @property
    def hessian(self) -> Float[Tensor, "d_in d_in"]:
        """XᵀX summed over all tokens so far."""
        if self._sum.ndim == 1:
            raise ValueError("these statistics keep only feature norms; collect them with with_hessian=True")
        if self._upper_only:
            for panel in self._panels():
                self._sum[panel.stop :, panel] = self._sum[panel, panel.stop :].T
            self._upper_only = False
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

        Only the upper half of XᵀX is summed; the other is filled in when it is asked for. Products of half-precision
        inputs are exact in float32, so a GPU multiplies them as they are and sums in float32.

        Raises:
            ValueError: not tokens of `d_in` floats each; a single token is [1, d_in].
            NonFiniteError: an input is NaN or infinite, or too large; nothing is added.
        """
        self._check_inputs(inputs)
        rows = inputs.detach().flatten(0, -2)
        self._check_range(rows)
        self._factors = {}
        self.tokens += len(rows)
        if self._sum.ndim == 1:
            self._sum += rows.to(self._sum.dtype).square().sum(dim=0)
            return
        on_tensor_cores = rows.is_cuda and rows.element_size() == 2 and self._sum.dtype == torch.float32
        if not on_tensor_cores:
            rows = rows.to(self._sum.dtype)
        for panel in self._panels():
            target, left, right = self._sum[panel, panel.start :], rows[:, panel].T, rows[:, panel.start :]
            if on_tensor_cores:
                target += torch.mm(left, right, out_dtype=torch.float32)
            else:
                target.addmm_(left, right)
        self._upper_only = True

    def knowing_nothing(self) -> "InputStatistics":
        """Statistics of the same kind as of inputs that are uncorrelated and of one size: H = I."""
        d_in = len(self._sum)
        nothing = InputStatistics(d_in, self._sum.ndim == 2, self._sum.dtype, self._sum.device)
        nothing.update(torch.eye(d_in, dtype=self._sum.dtype, device=self._sum.device))
        return nothing

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
        self._sum += other._sum
        self.tokens += other.tokens
        self._upper_only = self._upper_only or other._upper_only
        self._factors = {}

    def total(self, add_up: Callable[[Tensor], object]) -> None:
        """Turn this process's sums into those of all.

        Args:
            add_up: puts the sum of a tensor over all processes in its place.
        """
        tokens = torch.tensor([self.tokens], device=self._sum.device)
        add_up(self._sum)
        add_up(tokens)
        self.tokens = int(tokens)
        self._factors = {}

    def _panels(self) -> list[slice]:
        """Columns that are summed at a time, each with all columns after it."""
        d_in, width = len(self._sum), _panel_width(self._sum.device)
        return [slice(start, min(start + width, d_in)) for start in range(0, d_in, width)]

    def _check_range(self, rows: Float[Tensor, "tokens d_in"]) -> None:
        low, high = torch.aminmax(rows) if rows.numel() else (0.0, 0.0)
        largest = max(abs(float(low)), abs(float(high)))
        if not largest**2 * len(rows) < torch.finfo(self._sum.dtype).max:  # NaN fails too
            raise NonFiniteError("a layer's inputs are NaN or infinite, or too large for float32 sums")

    def _check_inputs(self, inputs: Any) -> None:
        check_tensor("inputs", inputs)
        d_in = self._sum.shape[-1]
        if inputs.ndim < 2 or inputs.shape[-1] != d_in or not inputs.is_floating_point():
            raise ValueError(
                f"inputs: expected floats [..., tokens, {d_in}], received {inputs.dtype} {tuple(inputs.shape)}"
            )


@dataclass(frozen=True)
class Factor:
    """A damped Hessian factored from the far end: H + λI = V Vᵀ with V upper triangular.

    Then U = V⁻¹ is the upper Cholesky factor of the inverse, which the published code computes by three cubic steps:
    1 / V_qq = U_qq, so the sweep needs no inverse at all.

    Args:
        V: upper triangular.
        dead: inputs that were zero on all calibration tokens.
        corners: V_jj⁻¹ of every `PANEL` columns.
    """

    V: Float[Tensor, "d d"]
    dead: Bool[Tensor, " d"]
    corners: tuple[Float[Tensor, "_ _"], ...]

    def to(self, dtype: torch.dtype) -> "Factor":
        """The same in another precision."""
        return Factor(self.V.to(dtype), self.dead, tuple(corner.to(dtype) for corner in self.corners))

    def inverses(self, blocksize: int) -> list[Float[Tensor, "_ _"]]:
        """V_jj⁻¹ of every `blocksize` columns: what U is on the diagonal."""
        if blocksize == PANEL:
            return list(self.corners)
        starts = range(0, len(self.V), blocksize)
        return [invert_upper(self.V[start : start + blocksize, start : start + blocksize]) for start in starts]


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
    diagonal = _damped_diagonal(hessian, percdamp)
    if not all_finite(hessian):
        raise _damaged()
    result = hessian.to(diagonal.dtype, copy=True)
    result.diagonal().copy_(diagonal)
    return result


def _damped_diagonal(hessian: Float[Tensor, "d d"], percdamp: float) -> Float[Tensor, " d"]:
    """The diagonal of `damped(hessian, percdamp)`, with its errors as far as the diagonal shows them."""
    check_percdamp(percdamp)
    check_hessian(hessian)
    diagonal = hessian.diagonal().to(working_dtype(hessian), copy=True)
    diagonal[dead_columns(hessian)] = 1
    diagonal += float(percdamp) * diagonal.mean()
    if not hessian.diagonal().isfinite().all():
        raise _damaged()
    if not diagonal.isfinite().all():
        raise NonFiniteError(
            f"the Hessian damped with percdamp {float(percdamp):g}, on a mean diagonal of "
            f"{hessian.diagonal().double().mean():g}, does not fit {diagonal.dtype}; lower percdamp (0.01 is usual)"
        )
    return diagonal


def _damaged() -> NonFiniteError:
    return NonFiniteError("the Hessian has NaN or infinite entries; look at the calibration inputs")


def working_dtype(*tensors: Float[Tensor, "..."]) -> torch.dtype:
    """float32, or float64 where one of the tensors is."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def cholesky(matrix: Float[Tensor, "d d"], percdamp: float, upper: bool = False) -> Float[Tensor, "d d"]:
    """The Cholesky factor of a damped Hessian or of its inverse, or an error with the remedy."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    _check_definite(info, len(matrix), percdamp)
    return factor


def _check_definite(info: Tensor, d_in: int, percdamp: float) -> None:
    if info.any():
        raise SingularHessianError(
            f"the Hessian of {d_in} inputs is not positive definite with percdamp {float(percdamp):g}; "
            "raise percdamp (0.01 to 0.1 is usual) or calibrate on more tokens"
        )


def invert_upper(triangle: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The inverse of a small upper triangle."""
    unit = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse: Tensor = torch.linalg.solve_triangular(triangle, unit, upper=True)
    return inverse


@torch.no_grad()
@full_precision()
def factorise(hessian: Float[Tensor, "d d"], percdamp: float) -> Factor:
    """Damp the Hessian and factor it once, for any number of layers that see these inputs.

    V is found from its last columns to its first, a panel at a time: with the columns after panel j known,
    V_{≤j,j} V_jjᵀ = (H + λI)_{≤j,j} − V_{≤j,>j} V_{j,>j}ᵀ. Nearly all the work is the product on the right, which runs
    at full speed where a library's Cholesky does not, and nothing has to be turned about. On a GPU, which waits for
    each panel's small steps, panels are wider.

    Args:
        hessian: XᵀX summed over calibration tokens; only its upper half is read.
        percdamp: see `damped`.

    Raises:
        ValueError, NonFiniteError: see `damped`.
        SingularHessianError: not positive definite even so; a larger percdamp or more tokens are the remedy.
    """
    diagonal = _damped_diagonal(hessian, percdamp)
    H = hessian.detach().to(diagonal.dtype)
    V = torch.zeros_like(H, memory_format=torch.contiguous_format)
    corners: list[Tensor] = []
    width = _panel_width(H.device)
    for start in reversed(range(0, len(V), width)):
        stop = min(start + width, len(V))
        rest = V[:stop, stop:] @ V[start:stop, stop:].T
        panel = torch.sub(H[:stop, start:stop], rest, out=V[:stop, start:stop])
        corner = panel[start:]
        corner.diagonal().copy_(diagonal[start:stop] - rest[start:].diagonal())
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))  # reads what was the upper half
        if not lower.diagonal().isfinite().all() or (info.any() and not all_finite(H)):
            raise _damaged()
        _check_definite(info, len(V), percdamp)
        corner.copy_(lower.flip(0, 1))
        inverse = invert_upper(corner)
        panel[:start] = panel[:start] @ inverse.T
        # The inverse of a triangle holds those of the smaller ones along its diagonal.
        corners.extend(inverse[at : at + PANEL, at : at + PANEL] for at in reversed(range(0, stop - start, PANEL)))
    return Factor(V, dead_columns(hessian), tuple(reversed(corners)))


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
