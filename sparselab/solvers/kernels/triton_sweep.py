"""The sweep of one block of columns as one Triton kernel: a tile of rows stays in registers for all of the columns.

Column by column in torch, a block of 128 takes a few hundred launches on a GPU; here it takes one. Import it only where
Triton is installed; with TRITON_INTERPRET=1 set before the import it runs on the CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.sparsity import NM

_TILE = 32


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
    flags = torch.zeros_like(W, dtype=torch.int8) if remove is None else remove.to(torch.int8)
    launch = _sweep_block[(triton.cdiv(rows, _TILE),)]
    with torch.cuda.device_of(W):  # Triton launches on the current device, wherever its arguments lie
        launch(
            W,
            flags.contiguous(),
            push.contiguous(),
            importance.contiguous(),
            rows,
            width,
            GROUP=choose.group if choose else 0,
            PRUNED=choose.pruned if choose else 0,
            WIDTH=triton.next_power_of_2(width),
            TILE=_TILE,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_block(  # type: ignore[no-untyped-def]
    w_ptr, flags_ptr, push_ptr, importance_ptr, rows, width,
    GROUP: tl.constexpr, PRUNED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    inside = (column[:, None] < width) & (row[None, :] < rows)
    places = column[:, None] * rows + row[None, :]
    w = tl.load(w_ptr + places, mask=inside, other=0.0)
    flags = tl.load(flags_ptr + places, mask=inside, other=0) != 0
    importance = tl.load(importance_ptr + column, mask=column < width, other=0.0)
    for q in range(width):
        if GROUP > 0:  # noqa: SIM102 - the outer one is settled when the kernel is compiled
            if q % GROUP == 0:
                # An entry goes if fewer than PRUNED of its group go before it: lower ones, and equal ones if earlier.
                scores = tl.abs(w) * importance[:, None]
                before = tl.zeros([WIDTH, TILE], tl.int32)
                for j in range(GROUP):
                    other = tl.sum(tl.where(column[:, None] == q + j, scores, 0.0), axis=0)[None, :]
                    first = (other < scores) | ((other == scores) & (q + j < column[:, None]))
                    before += first.to(tl.int32)
                group = (column[:, None] >= q) & (column[:, None] < q + GROUP)
                flags = tl.where(group, before < PRUNED, flags)
        removed = tl.sum(tl.where((column[:, None] == q) & flags, w, 0.0), axis=0)
        pushed = tl.load(push_ptr + q * width + column, mask=column < width, other=0.0)
        w += pushed[:, None] * removed[None, :]
    tl.store(w_ptr + places, tl.where(flags, 0.0, w), mask=inside)
