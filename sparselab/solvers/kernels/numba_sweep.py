"""The sweep of one block of columns, compiled for the processor: a tile of rows stays in its cache for all columns.

Compiled in a few seconds when it is first called for a type of weights, and kept on disk for all later processes.
"""

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.quantisation import Grid
from sparselab.solvers.sparsity import NM

_TILE = 64  # rows
_TOGETHER = 4  # columns whose removed weights reach the later columns in one go; spelled out below
_ONE_AT_A_TIME = threading.Lock()  # where numba finds neither OpenMP nor TBB, two calls at once would end the process


def sweep_block(
    W: Float[Tensor, "width rows"],
    push: Float[Tensor, "width width"],
    importance: Float[Tensor, " width"],
    remove: Bool[Tensor, "width rows"] | None,
    choose: NM | None,
    grid: Grid | None = None,
) -> None:
    """Compensated weights of one block to pruned ones, in place; see `kernels.block_sweeper`."""
    flags = torch.empty(0, 0, dtype=torch.bool) if remove is None else remove.contiguous()
    group, pruned = (choose.group, choose.pruned) if choose else (0, 0)
    padded = torch.nn.functional.pad(push, (0, 0, 0, _TOGETHER - 1))  # the last columns look beyond them, for nothing
    step, zero, top = (grid.step, grid.zero, grid.top) if grid else (W.new_empty(0), W.new_empty(0), 0)
    threads = torch.get_num_threads()
    with _ONE_AT_A_TIME:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        _sweep_tiles(
            W.numpy(), padded.numpy(), importance.contiguous().numpy(), flags.numpy(), group, pruned,
            step.numpy(), zero.numpy(), top,
        )  # fmt: skip
    if torch.get_num_threads() != threads:  # numba has just started the OpenMP that it shares with torch, on all cores
        torch.set_num_threads(threads)


def _compiled(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: compile, and keep the result on disk for the next process."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        compiled: Callable[..., None]
        try:
            compiled = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # it can be written neither beside this file nor into one of the user's folders
            compiled = numba.njit(nogil=True, **options)(function)
        return compiled

    return decorate


@_compiled(parallel=True)
def _sweep_tiles(W, push, importance, remove, group, pruned, step, zero, top):  # type: ignore[no-untyped-def]
    for tile in numba.prange((W.shape[1] + _TILE - 1) // _TILE):
        _sweep_tile(W, push, importance, remove, group, pruned, step, zero, top, tile * _TILE)


@_compiled(fastmath={"contract"})
def _sweep_tile(W, push, importance, remove, group, pruned, step, zero, top, row):  # type: ignore[no-untyped-def]
    width, rows = len(W), min(_TILE, W.shape[1] - row)
    w, flags = np.zeros((width, _TILE), W.dtype), np.zeros((width, _TILE), np.bool_)
    removed = np.empty((_TOGETHER, _TILE), W.dtype)
    for q in range(width):
        for t in range(rows):
            w[q, t] = W[q, row + t]
        if not group:
            for t in range(rows):
                flags[q, t] = remove[q, row + t]
    span = group if group else width
    for begin in range(0, width, span):
        end = begin + span
        if group:
            _choose(w, flags, begin, end, importance, pruned)
        for start in range(begin, end, _TOGETHER):
            _prune(w, flags, removed, push, start, min(start + _TOGETHER, end), step[row:], zero[row:], top)
    for q in range(width):
        for t in range(rows):
            W[q, row + t] = (
                0 if flags[q, t] else _on_grid(w[q, t], step[row + t], zero[row + t], top) if top else w[q, t]
            )


@_compiled(fastmath={"contract"})
def _prune(w, flags, removed, push, start, stop, step, zero, top):  # type: ignore[no-untyped-def]
    """Remove what is flagged of the columns from start to stop, and let the columns after them make good for it."""
    removed[:] = 0
    for q in range(start, stop):
        for t in range(_TILE):
            removed[q - start, t] = w[q, t] if flags[q, t] else 0
        if top:
            for t in range(min(_TILE, len(step))):
                if not flags[q, t]:
                    removed[q - start, t] = w[q, t] - _on_grid(w[q, t], step[t], zero[t], top)
        for p in range(q + 1, stop):
            for t in range(_TILE):
                w[p, t] += push[q, p] * removed[q - start, t]
    for p in range(stop, len(w)):
        a, b, c, d = push[start, p], push[start + 1, p], push[start + 2, p], push[start + 3, p]
        for t in range(_TILE):
            w[p, t] += a * removed[0, t] + b * removed[1, t] + c * removed[2, t] + d * removed[3, t]


@_compiled()
def _on_grid(value, step, zero, top):  # type: ignore[no-untyped-def]
    return step * (min(max(np.round(value / step) + zero, 0), top) - zero)


@_compiled()
def _choose(w, flags, begin, end, importance, pruned):  # type: ignore[no-untyped-def]
    """An entry goes if fewer than `pruned` of its group go before it: lower ones, and equal ones if earlier."""
    scores, before = np.empty((end - begin, _TILE), w.dtype), np.empty(_TILE, np.int32)
    for q in range(begin, end):
        for t in range(_TILE):
            scores[q - begin, t] = abs(w[q, t]) * importance[q]
    for q in range(end - begin):
        before[:] = 0
        for other in range(q):
            for t in range(_TILE):
                before[t] += scores[other, t] <= scores[q, t]
        for other in range(q + 1, end - begin):
            for t in range(_TILE):
                before[t] += scores[other, t] < scores[q, t]
        for t in range(_TILE):
            flags[begin + q, t] = before[t] < pruned
