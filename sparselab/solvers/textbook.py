"""SparseGPT as the paper writes it, column by column with the inverse: to be read, shown and tested against."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.checks import check_hessian, check_matrix, check_weight, fitted
from sparselab.solvers.hessian import cholesky, damped, dead_columns, working_dtype
from sparselab.solvers.quantisation import Grid, row_grids
from sparselab.solvers.sparsity import NM, Pattern, check_sweep, parse_sparsity, survivors


@dataclass(frozen=True)
class Step:
    """The textbook sweep as it stands once one more column is done.

    Args:
        column: q, the column this step dealt with.
        start: first column of the group that q belongs to, whose weights competed before any of them was pruned.
        weight: all columns as this step leaves them.
        keep: True where a weight survives; columns after the group are undecided and count as kept.
        scores: w²/U_qq² of the group's columns, at the time they competed.
        errors: (w − ŵ)/U_qq of column q when its turn came, one a row.
        compensation: what this step added to the columns after q; zero up to and including q.
    """

    column: int
    start: int
    weight: Float[Tensor, "d_out d_in"]
    keep: Bool[Tensor, "d_out d_in"]
    scores: Float[Tensor, "d_out group"]
    errors: Float[Tensor, " d_out"]
    compensation: Float[Tensor, "d_out d_in"]


def sparsegpt_textbook(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str | Pattern,
    percdamp: float = 0.01,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
    wbits: int | None = None,
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_out d_in"]]:
    """SparseGPT as the paper writes it: U = chol((H + λI)⁻¹), each column's error pushed onto the columns after it.

    Slow and plain: for reading, teaching and testing. Arguments and errors are those of `sparsegpt`; the sweep itself
    is `textbook_steps`.

    Returns:
        The pruned weight, and the errors (w − ŵ)/U_qq of every weight when its turn came, whose squares sum to
        tr((W−Ŵ)(H+λI)(W−Ŵ)ᵀ).
    Source: Frantar & Alistarh 2023, algorithm 1.
    """
    check_matrix("weight", weight)
    check_hessian(hessian, weight)
    W = weight
    errors = torch.zeros_like(weight, dtype=working_dtype(weight, hessian))
    for step in textbook_steps(weight, hessian, sparsity, percdamp, blocksize, keep, wbits):
        W = step.weight
        errors[:, step.column] = step.errors
    return fitted(W, weight.dtype), errors


def textbook_steps(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str | Pattern,
    percdamp: float = 0.01,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
    wbits: int | None = None,
) -> Iterator[Step]:
    """The sweep of `sparsegpt_textbook`, one column at a time: err_q = (w_q − ŵ_q)/U_qq, then W_{>q} −= err_q U_{q,>q}.

    Args:
        weight, hessian, sparsity, percdamp, blocksize, keep, wbits: see `sparsegpt`; checked before the first step.

    Returns:
        One `Step` for each column, from the first to the last; no later step changes an earlier one.

    Raises:
        ValueError, TypeError, NonFiniteError, SingularHessianError: see `sparsegpt`.
    Source: Frantar & Alistarh 2023, algorithm 1.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    check_hessian(hessian, weight)
    check_sweep(weight, pattern, blocksize, keep)
    H = damped(hessian.detach().to(working_dtype(weight, hessian)), percdamp)
    U = cholesky(torch.cholesky_inverse(cholesky(H, percdamp)), percdamp, upper=True)
    importance = torch.where(dead_columns(hessian), 0, 1 / U.diagonal())
    group = pattern.group if isinstance(pattern, NM) else blocksize
    W = weight.detach().to(H.dtype)
    grid = None if wbits is None else row_grids(W, wbits)
    return _steps(W, U, importance, pattern, group, keep, grid)


def _steps(
    W: Float[Tensor, "d_out d_in"],
    U: Float[Tensor, "d_in d_in"],
    importance: Float[Tensor, " d_in"],
    pattern: Pattern,
    group: int,
    keep: Bool[Tensor, "d_out d_in"] | None,
    grid: Grid | None,
) -> Iterator[Step]:
    mask = torch.ones_like(W, dtype=torch.bool) if keep is None else keep
    for q in range(W.shape[1]):
        if q % group == 0:
            start, scores = q, (W[:, q : q + group] * importance[q : q + group]).abs()
            if keep is None:
                mask = mask.clone()
                mask[:, q : q + group] = _decide(scores, pattern)
        stays = (W[:, q] if grid is None else grid.round(W[:, q])) * mask[:, q]
        errors = (W[:, q] - stays) / U[q, q]
        compensation = torch.zeros_like(W)
        compensation[:, q + 1 :] = -torch.outer(errors, U[q, q + 1 :])
        W = W + compensation
        W[:, q] = stays
        yield Step(q, start, W, mask, scores.square(), errors, compensation)


def _decide(scores: Float[Tensor, "d_out group"], pattern: Pattern) -> Bool[Tensor, "d_out group"]:
    """N:M competes within each row; unstructured over all rows, input by input where scores are equal."""
    if isinstance(pattern, NM):
        return survivors(scores, pattern)
    return survivors(scores.T.flatten(), pattern).view(scores.T.shape).T
