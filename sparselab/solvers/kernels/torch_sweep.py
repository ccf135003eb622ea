"""The sweep of one block of columns in torch, for any device and precision: what the other kernels are held against."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.quantisation import Grid
from sparselab.solvers.sparsity import NM, lowest_of_few

# Columns whose mutual influence is applied one by one; between such groups it is one matrix product.
_COLUMNS_AT_ONCE = 16


def sweep_block(
    W: Float[Tensor, "width rows"],
    push: Float[Tensor, "width width"],
    importance: Float[Tensor, " width"],
    remove: Bool[Tensor, "width rows"] | None,
    choose: NM | None,
    grid: Grid | None = None,
) -> None:
    """Compensated weights of one block to pruned ones, in place; see `kernels.block_sweeper`."""
    push = push.T.contiguous()
    removed = torch.zeros_like(W)
    flags = torch.empty_like(W) if remove is None else remove.to(W.dtype)
    columns = list(zip(W, flags, removed, strict=True))
    step = max(choose.group, _COLUMNS_AT_ONCE // choose.group * choose.group) if choose else _COLUMNS_AT_ONCE
    for first in range(0, len(W), step):
        last = min(first + step, len(W))
        W[first:last].addmm_(push[first:last, :first], removed[:first])
        group = choose.group if choose else last - first
        for start in range(first, last, group):
            few = slice(start, start + group)
            if choose:
                W[few].addmm_(push[few, first:start], removed[first:start])
                scores = W[few].abs().mul_(importance[few, None])
                flags[few] = lowest_of_few(scores, choose.pruned)
            before = removed[few].T  # of the columns still to come it holds zeros
            for (w, flag, out), pushed in zip(columns[few], push[few, few], strict=True):
                w.addmv_(before, pushed)
                if grid is None:
                    torch.mul(w, flag, out=out)
                else:
                    torch.sub(w, grid.round(w) * (1 - flag), out=out)
    W.sub_(removed)
    if grid is not None:  # the difference above is rounded
        W.copy_(grid.round(W))
