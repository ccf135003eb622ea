"""The sweep of one block of columns as one Triton kernel: a tile of rows goes through all of the columns by itself.

Column by column in torch, a block of 128 takes a few hundred launches on a GPU; here it takes one. Import it only where
Triton is installed; with TRITON_INTERPRET=1 set before the import it runs on the CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.sparsity import NM

# Rows of a tile, and columns that stay in registers while their mutual influence is applied one by one; what columns
# before them owe arrives as products of matrices, which have to be at least that large.
_TILE, _COLUMNS_AT_ONCE = 32, 16


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def sweep_block(
    W: Float[Tensor, "width rows"],
    push: Float[Tensor, "width width"],
    importance: Float[Tensor, " width"],
    remove: Bool[Tensor, "width rows"] | None,
    choose: NM | None,
    _grid: None = None,
) -> None:
    """Compensated weights of one block to pruned ones, in place; see `block_sweeper`."""
    width, rows = W.shape
    group, pruned = (choose.group, choose.pruned) if choose else (0, 0)
    step = max(group, _COLUMNS_AT_ONCE // group * group) if group else _COLUMNS_AT_ONCE
    launch = _sweep_block[(triton.cdiv(rows, _TILE),)]
    with torch.cuda.device_of(W):  # Triton launches on the current device, wherever its arguments lie
        launch(
            W,
            torch.empty_like(W),
            W if remove is None else remove.contiguous().view(torch.int8),
            push.contiguous(),
            importance.contiguous(),
            rows,
            width,
            GROUP=group,
            PRUNED=pruned,
            STEP=step,
            SIZE=max(triton.next_power_of_2(step), _COLUMNS_AT_ONCE),
            K=_COLUMNS_AT_ONCE,
            TILE=_TILE,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_block(  # type: ignore[no-untyped-def]
    w_ptr, removed_ptr, flags_ptr, push_ptr, importance_ptr, rows, width,
    GROUP: tl.constexpr, PRUNED: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, SIZE)
    for first in range(0, width, STEP):
        column = first + place
        mine = (place < STEP) & (column < width)
        inside = mine[:, None] & (row < rows)[None, :]
        entries = column[:, None] * rows + row[None, :]
        w = tl.load(w_ptr + entries, mask=inside, other=0.0)
        for start in range(0, first, K):
            before = start + tl.arange(0, K)
            earlier = before < first
            pushed = tl.load(
                push_ptr + before[None, :] * width + column[:, None], mask=mine[:, None] & earlier[None, :], other=0.0
            )
            removed = tl.load(
                removed_ptr + before[:, None] * rows + row[None, :],
                mask=earlier[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            w = tl.dot(pushed, removed, w, input_precision="ieee", out_dtype=w.dtype)
        if GROUP > 0:
            importance = tl.load(importance_ptr + column, mask=mine, other=0.0)
            flags = tl.zeros([SIZE, TILE], tl.int1)
        else:
            flags = tl.load(flags_ptr + entries, mask=inside, other=0) != 0
        for q in range(STEP):
            if GROUP > 0:  # noqa: SIM102 - the outer one is settled when the kernel is compiled
                if q % GROUP == 0:
                    # An entry goes if fewer than PRUNED of its group go before it: lower ones, and earlier equal ones.
                    scores = tl.abs(w) * importance[:, None]
                    rank = tl.zeros([SIZE, TILE], tl.int32)
                    for j in range(GROUP):
                        other = tl.sum(tl.where(place[:, None] == q + j, scores, 0.0), axis=0)[None, :]
                        lower = (other < scores) | ((other == scores) & (q + j < place[:, None]))
                        rank += lower.to(tl.int32)
                    group = (place[:, None] >= q) & (place[:, None] < q + GROUP)
                    flags = tl.where(group, rank < PRUNED, flags)
            gone = tl.sum(tl.where((place[:, None] == q) & flags, w, 0.0), axis=0)
            onto = tl.load(push_ptr + (first + q) * width + column, mask=mine & (first + q < width), other=0.0)
            w += onto[:, None] * gone[None, :]
        tl.store(removed_ptr + entries, tl.where(flags, w, 0.0), mask=inside)
        tl.store(w_ptr + entries, tl.where(flags, 0.0, w), mask=inside)
        tl.debug_barrier()  # the columns to come read what other threads of the tile have removed
