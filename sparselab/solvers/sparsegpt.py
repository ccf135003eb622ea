"""SparseGPT: walk the columns, prune by second-order score, let later columns make good what earlier ones lost.

`sparsegpt` is the production path: one Cholesky factor and no inverse. `sparsegpt_textbook` is the same algorithm as
the paper writes it, column by column, to be read and to be tested against; `textbook_steps` shows it at work.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.checks import check_blocksize, check_hessian, check_keep, check_matrix, check_weight, fitted
from sparselab.solvers.hessian import Factor, cholesky, damped, dead_columns, factorise, full_precision, working_dtype
from sparselab.solvers.sparsity import NM, Pattern, parse_sparsity, survivors

# Columns whose mutual influence is applied one by one; between such groups it is one matrix product.
_COLUMNS_AT_ONCE = 32


def sparsegpt(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str | Pattern,
    percdamp: float = 0.01,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
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

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · size)` entries pruned in each block of columns.

    Raises:
        ValueError: wrong sparsity, shapes, percdamp or blocksize, or M does not divide d_in and blocksize.
        TypeError: an argument is not a tensor, a number or a boolean mask.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries, or the result does not fit the dtype.
        SingularHessianError: the damped Hessian is not positive definite.
    Source: Frantar & Alistarh 2023, algorithm 1; the factor without an inverse is sparselab's own.
    """
    pattern = parse_sparsity(sparsity)
    check_matrix("weight", weight)  # the sweep sees to its entries
    check_hessian(hessian, weight)
    factor = factorise(hessian.to(working_dtype(weight, hessian)), percdamp)
    return sweep(weight, factor, pattern, blocksize, keep)


@torch.no_grad()
@full_precision()
def sweep(
    weight: Float[Tensor, "d_out d_in"],
    factor: Factor,
    sparsity: float | str | Pattern,
    blocksize: int = 128,
    keep: Bool[Tensor, "d_out d_in"] | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """The column sweep of SparseGPT on a factored Hessian; layers that share inputs share the factor.

    With Δ = W − Ŵ on the columns done and H + λI = V Vᵀ, the compensated value of the next column is
    w_q + (Δ_{<q} V_{<q,q}) / V_qq, and that of a whole block j is W_j + (Δ_{<j} V_{<j,j}) V_jj⁻¹. So no column is
    updated before its turn: what the columns before it owe arrives as one matrix product for each block.

    Args:
        weight, sparsity, blocksize, keep: see `sparsegpt`.
        factor: from `factorise`, of a Hessian of this weight's inputs.

    Raises:
        ValueError, TypeError, NonFiniteError: see `sparsegpt`.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    _check_factor(factor, weight)
    _check_sweep(weight, pattern, blocksize, keep)
    factor = factor.to(working_dtype(weight, factor.V))
    V, d_in = factor.V, weight.shape[1]
    # Transposed, so that a column of W is contiguous.
    W = weight.T.to(V.dtype).contiguous()
    mask = torch.empty_like(W, dtype=torch.bool) if keep is None else keep.T.contiguous()
    delta = torch.empty_like(W)
    for start in range(0, d_in, blocksize):
        stop = min(start + blocksize, d_in)
        owed = V[:start, start:stop].T @ delta[:start]
        if keep is None and not isinstance(pattern, NM):
            scores = _scores(W, factor, owed, start, stop)
            mask[start:stop] = survivors(scores.flatten(), pattern).view_as(scores)
        _sweep_block(W, delta, mask, owed, factor, start, pattern if keep is None else None)
    return fitted(W - delta, weight.dtype).T.contiguous()


def _sweep_block(
    W: Float[Tensor, "d_in d_out"],
    delta: Float[Tensor, "d_in d_out"],
    mask: Bool[Tensor, "d_in d_out"],
    owed: Float[Tensor, "width d_out"],
    factor: Factor,
    start: int,
    choose: Pattern | None,
) -> None:
    """Fill `delta` (and for N:M `mask`) for the columns of one block; `owed` is Δ_{<start} V_{<start,block}."""
    V, stop = factor.V, start + len(owed)
    group = choose.group if isinstance(choose, NM) else 1
    step = max(group, _COLUMNS_AT_ONCE // group * group)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        here = owed[first - start : last - start] + V[start:first, first:last].T @ delta[start:first]
        for q in range(first, last):
            if isinstance(choose, NM) and q % group == 0:
                scores = _scores(W, factor, here[q - first : q - first + group], q, q + group)
                mask[q : q + group] = survivors(scores.T, choose).T
            correction = here[q - first] / V[q, q]
            torch.where(mask[q], -correction, W[q], out=delta[q])
            here[q - first + 1 :].addr_(V[q, q + 1 : last], delta[q])


def _scores(
    W: Float[Tensor, "d_in d_out"], factor: Factor, owed: Float[Tensor, "width d_out"], start: int, stop: int
) -> Float[Tensor, "width d_out"]:
    """|w/U_qq| = |w·V_qq| of the compensated columns start:stop, before any of them is pruned.

    They stand in the order of their squares, the losses of the paper, which a float may be too small or too large for.

    Source: Frantar & Alistarh 2023, equation 3, with the Hessian of the columns not yet done.
    """
    triangle = factor.V[start:stop, start:stop]
    compensated = W[start:stop] + torch.linalg.solve_triangular(triangle.T, owed, upper=False)
    scores: Tensor = (compensated * triangle.diagonal()[:, None]).abs()
    scores[factor.dead[start:stop]] = 0
    return scores


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
    for step in textbook_steps(weight, hessian, sparsity, percdamp, blocksize, keep):
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
) -> Iterator[Step]:
    """The sweep of `sparsegpt_textbook`, one column at a time: err_q = (w_q − ŵ_q)/U_qq, then W_{>q} −= err_q U_{q,>q}.

    Args:
        weight, hessian, sparsity, percdamp, blocksize, keep: see `sparsegpt`; checked before the first step.

    Returns:
        One `Step` for each column, from the first to the last; no later step changes an earlier one.

    Raises:
        ValueError, TypeError, NonFiniteError, SingularHessianError: see `sparsegpt`.
    Source: Frantar & Alistarh 2023, algorithm 1.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    check_hessian(hessian, weight)
    _check_sweep(weight, pattern, blocksize, keep)
    H = damped(hessian.detach().to(working_dtype(weight, hessian)), percdamp)
    U = cholesky(torch.cholesky_inverse(cholesky(H, percdamp)), percdamp, upper=True)
    importance = torch.where(dead_columns(hessian), 0, 1 / U.diagonal())
    group = pattern.group if isinstance(pattern, NM) else blocksize
    return _steps(weight.detach().to(H.dtype), U, importance, pattern, group, keep)


def _steps(
    W: Float[Tensor, "d_out d_in"],
    U: Float[Tensor, "d_in d_in"],
    importance: Float[Tensor, " d_in"],
    pattern: Pattern,
    group: int,
    keep: Bool[Tensor, "d_out d_in"] | None,
) -> Iterator[Step]:
    mask = torch.ones_like(W, dtype=torch.bool) if keep is None else keep
    for q in range(W.shape[1]):
        if q % group == 0:
            start, scores = q, (W[:, q : q + group] * importance[q : q + group]).abs()
            if keep is None:
                mask = mask.clone()
                mask[:, q : q + group] = _decide(scores, pattern)
        errors = torch.where(mask[:, q], 0, W[:, q]) / U[q, q]
        compensation = torch.zeros_like(W)
        compensation[:, q + 1 :] = -torch.outer(errors, U[q, q + 1 :])
        W = W + compensation
        W[:, q].masked_fill_(~mask[:, q], 0)
        yield Step(q, start, W, mask, scores.square(), errors, compensation)


def _decide(scores: Float[Tensor, "d_out group"], pattern: Pattern) -> Bool[Tensor, "d_out group"]:
    """N:M competes within each row; unstructured over all rows, input by input where scores are equal."""
    if isinstance(pattern, NM):
        return survivors(scores, pattern)
    return survivors(scores.T.flatten(), pattern).view(scores.T.shape).T


def _check_sweep(
    weight: Float[Tensor, "d_out d_in"], pattern: Pattern, blocksize: int, keep: Bool[Tensor, "..."] | None
) -> None:
    check_blocksize(blocksize)
    if keep is None:
        pattern.check(weight.shape[1], blocksize)
    else:
        check_keep(weight, keep)


def _check_factor(factor: Any, weight: Float[Tensor, "d_out d_in"]) -> None:
    if not isinstance(factor, Factor):
        raise TypeError(f"factor: expected what factorise gives, received {type(factor).__name__}")
    if len(factor.V) != weight.shape[1]:
        raise ValueError(f"factor: expected one of {weight.shape[1]} inputs, received one of {len(factor.V)}")
