"""SparseGPT: walk the columns, prune by second-order score, let later columns make good what earlier ones lost.

This is the production path: one Cholesky factor, no inverse of the Hessian, one matrix product a block of columns. The
same algorithm as the paper writes it, column by column, stands in `textbook.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sparselab.solvers.checks import check_hessian, check_matrix, check_weight, fitted
from sparselab.solvers.hessian import Factor, factorise, full_precision, working_dtype
from sparselab.solvers.kernels import Kernel, block_sweeper
from sparselab.solvers.quantisation import row_grids
from sparselab.solvers.sparsity import NM, Pattern, check_sweep, lowest, parse_sparsity

# Columns that what all columns before them owe reaches in one matrix product, which is slower on fewer.
_COLUMNS_A_PANEL = 512


def sparsegpt(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str | Pattern,
    percdamp: float = 0.01,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
    wbits: int | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """Prune a weight and compensate: every pruned weight's effect on the outputs is spread over the columns after it.

    Args:
        weight: [d_out, d_in]; not modified.
        hessian: XᵀX over the calibration tokens, not damped, of any scale; not modified.
        sparsity: 0.5, "50%", "2:4" or a pattern.
        percdamp: fraction of the mean diagonal added to the diagonal.
        blocksize: columns whose weights compete for survival (all rows × blocksize); the last block may be narrower.
            For N:M each row's groups of M compete instead.
        keep: a mask to use as it is, True where the weight survives; `sparsity` is then not consulted.
        wbits: also round what stays to the values of each row's grid (see `row_grids`), and compensate for that in the
            same way. Zeros stay zeros, and small weights may be rounded to zero besides.

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · size)` entries pruned in each block of columns.

    Raises:
        ValueError: wrong sparsity, shapes, percdamp, blocksize or wbits, or M does not divide d_in and blocksize.
        TypeError: an argument is not a tensor, a number or a boolean mask.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries, or the result does not fit the dtype.
        SingularHessianError: the damped Hessian is not positive definite.
    Source: Frantar & Alistarh 2023, algorithm 1, and section 3.5 for wbits; the factor without an inverse is
        sparselab's own.
    """
    pattern = parse_sparsity(sparsity)
    check_matrix("weight", weight)  # the sweep sees to its entries
    check_hessian(hessian, weight)
    check_sweep(weight, pattern, blocksize, keep)
    factor = factorise(hessian.to(working_dtype(weight, hessian)), percdamp)
    return sweep(weight, factor, pattern, blocksize, keep, wbits=wbits)


def sweep(
    weight: Float[Tensor, "d_out d_in"],
    factor: Factor,
    sparsity: float | str | Pattern,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
    kernel: Kernel = "auto",
    wbits: int | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """The column sweep of SparseGPT on a factored Hessian.

    With Δ = W − Ŵ on the columns done and H + λI = V Vᵀ, the compensated weights of the next block j of columns are
    W_j + Δ_{<j} V_{<j,j} V_jj⁻¹: no column is touched before its block's turn, and what all columns before it owe
    arrives as one matrix product. Inside the block, U_jj = V_jj⁻¹ serves as in the paper.

    Args:
        weight, sparsity, blocksize, keep, wbits: see `sparsegpt`.
        factor: from `factorise`, of a Hessian of this weight's inputs.
        kernel: what sweeps a block; see `kernels.block_sweeper`.

    Raises:
        ValueError, TypeError, NonFiniteError: see `sparsegpt`.
    """
    masks = None if keep is None else [keep]
    return next(sweep_together([weight], factor, sparsity, blocksize, masks, kernel, wbits))


def least_flop(d_out: int, d_in: int) -> float:
    """What a solve cannot do without: the Cholesky factor, and a triangular product with the weight; in operations."""
    return d_in**3 / 3 + d_out * d_in**2


@torch.no_grad()
@full_precision()
def sweep_together(
    weights: Sequence[Float[Tensor, "_ d_in"]],
    factor: Factor,
    sparsity: float | str | Pattern,
    blocksize: int = 128,
    keep: Sequence[Bool[Tensor, "_ d_in"]] | None = None,
    kernel: Kernel = "auto",
    wbits: int | None = None,
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """`sweep` for layers that see the same inputs (q, k and v; gate and up), all of one dtype, in one go.

    Each layer's weights compete among themselves only; the answers are those of `sweep` for each layer, but for
    rounding.

    Args:
        weights: of any number of outputs each.
        factor, sparsity, blocksize, kernel, wbits: see `sweep`.
        keep: a mask for each weight, or None.

    Returns:
        The new weights in order. Whether one fits its dtype is checked when it is taken.

    Raises:
        ValueError, TypeError, NonFiniteError: see `sparsegpt`.
    """
    pattern = parse_sparsity(sparsity)
    if len({(weight.dtype, weight.device) for weight in weights}) != 1:
        raise ValueError(f"weights: expected some of one dtype and device, received {len(weights)} of different ones")
    for number, weight in enumerate(weights):
        check_weight(weight)
        _check_factor(factor, weight)
        check_sweep(weight, pattern, blocksize, None if keep is None else keep[number])
    stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    masks = None if keep is None else torch.cat(list(keep))
    rows = [len(weight) for weight in weights]
    factor = factor.to(working_dtype(stacked, factor.V))
    V, inverses = factor.V, factor.inverses(blocksize)
    importance = torch.where(factor.dead, 0, V.diagonal())
    sweep_block = block_sweeper(kernel, blocksize, V.device, wbits is not None)
    grid = None if wbits is None else row_grids(stacked.to(V.dtype), wbits)
    choose = pattern if masks is None and isinstance(pattern, NM) else None
    pruned = torch.empty_like(stacked, memory_format=torch.contiguous_format)
    # From here on a column of W is a row. The work arrays serve all panels: new ones would be fetched from the system.
    delta = V.new_empty(len(V), len(stacked))  # Δ = W − Ŵ of the columns done
    width = min(max(blocksize, _COLUMNS_A_PANEL // blocksize * blocksize), len(V))
    work = V.new_empty(2, width, len(stacked))
    for first in range(0, len(V), width):
        panel = slice(first, min(first + width, len(V)))
        blocks = [
            (slice(start, min(start + blocksize, panel.stop)), inverses[start // blocksize])
            for start in range(first, panel.stop, blocksize)
        ]
        dense, compensated = work[:, : panel.stop - first]
        _transpose(stacked[:, panel], dense, compensated)
        arriving = torch.cat([V[:first, block] @ U for block, U in blocks], dim=1)
        torch.addmm(dense, arriving.T, delta[:first], out=compensated)
        for block, U in blocks:
            here = slice(block.start - first, block.stop - first)
            W = compensated[here]
            W.addmm_((V[first : block.start, block] @ U).T, delta[first : block.start])
            remove = _lowest_of_each(W, importance[block], rows, pattern) if masks is None else ~masks[:, block].T
            push = (U / -U.diagonal()[:, None]).triu_(1)
            sweep_block(W, push, importance[block], remove, choose, grid)
            W.copy_(W.to(stacked.dtype))  # Δ is taken of the rounded ones, so that later columns make good for it too
            torch.sub(dense[here], W, out=delta[block])
        _transpose(compensated, pruned[:, panel], dense)
    return (fitted(part, stacked.dtype) for part in pruned.split(rows))


def _transpose(source: Shaped[Tensor, "a b"], target: Shaped[Tensor, "b a"], scratch: Shaped[Tensor, "_ _"]) -> None:
    """Copy across, by way of work space: a copy from one contiguous matrix to another takes half the time of any other.

    Of source and target one is contiguous.
    """
    if source.is_contiguous():
        target.copy_(scratch.view(target.shape).copy_(source.T))
    else:
        target.copy_(scratch.view(source.shape).copy_(source).T)


def _lowest_of_each(
    W: Float[Tensor, "width rows"], importance: Float[Tensor, " width"], rows: Sequence[int], pattern: Pattern
) -> Bool[Tensor, "width rows"] | None:
    """What goes of a block, chosen in each layer by itself, input by input where scores are equal; None for N:M.

    Ranked by |w|/U_qq, the root of the paper's score (equation 3), whose square a float may be too small for.
    """
    if isinstance(pattern, NM):
        return None  # its groups choose one after the other, each from weights that those before it have changed
    scores = W.abs().mul_(importance[:, None])
    parts = [
        lowest(part.flatten(), round(pattern.fraction * part.numel())).view_as(part)
        for part in scores.split(list(rows), dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _check_factor(factor: Any, weight: Float[Tensor, "d_out d_in"]) -> None:
    if not isinstance(factor, Factor):
        raise TypeError(f"factor: expected what factorise gives, received {type(factor).__name__}")
    if len(factor.V) != weight.shape[1]:
        raise ValueError(f"factor: expected one of {weight.shape[1]} inputs, received one of {len(factor.V)}")
