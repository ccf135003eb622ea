"""What pruning a checkpoint will take, before it begins: memory, disk and time, from one batch through one block."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sparselab import files
from sparselab.calibration import enter, observe
from sparselab.errors import NotEnoughMemoryError
from sparselab.methods import Settings, find
from sparselab.models.blocks import Decoder, evaluating, find_linears, weight_shape
from sparselab.models.inputs import batches
from sparselab.ranks import Ranks
from sparselab.resources import PeakMemory, available_memory
from sparselab.walk import collects, sharing

# The part of a square product's rate that a solve reaches; see benchmarks/RESULTS.md.
_SHARE_OF_RATE = 0.5
_RATE_SIZE = 1024


@dataclass(frozen=True)
class Needs:
    """About what a run takes.

    Args:
        memory: bytes at the highest point, on the device, besides what is in use already.
        disk: bytes to be written.
        seconds: from now on.
    """

    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} minutes" if self.seconds > 90 else f"{self.seconds:.0f} seconds"
        return f"about {self.memory / 1e9:.2f} GB of memory, {self.disk / 1e9:.2f} GB of disk and {minutes}"


def estimate(
    decoder: Decoder,
    settings: Settings,
    windows: Int[Tensor, "n seqlen"] | None,
    batch_size: int | None,
    to_do: int,
    to_write: int,
    spill: bool,
    ranks: Ranks,
) -> Needs:
    """Run the first batch through the first block, and reckon with that.

    Args:
        decoder, settings, windows, batch_size: see `walk_all`.
        to_do, to_write: blocks and bytes of the output that are still to come.
        spill: whether hidden states go to disk.
        ranks: those who share the windows and the solves; bytes are those of this process.
    """
    with evaluating(decoder.model), PeakMemory(decoder.device) as probe:
        streams, seen, hidden, passes = [], {}, 0, 0.0
        if windows is not None and collects(settings) != "nothing":
            own = ranks.part(windows)
            parts = list(batches(own, batch_size, decoder.device))
            streams = enter(decoder, parts[0], len(parts[0]))
            copies = 2 if settings.propagate == "dense" else 1
            hidden = copies * streams[0].hidden.nbytes * len(own) // len(parts[0])
        started = time.perf_counter()
        with decoder.block(0) as block:
            read = time.perf_counter() - started
            if streams:
                seen = observe(decoder, 0, streams, collects(settings) == "hessian", False)
                passes = 2 * len(parts) * (time.perf_counter() - started - read)
            linears = find_linears(block)
            groups = sharing(0, linears, seen, settings)
    passes *= len(groups) if settings.true_sequential else 1
    shapes = [[weight_shape(linears[name]) for name in group] for group in groups]
    work, flop = _solve(shapes, settings)
    memory = probe.bytes + work + (0 if spill else hidden)
    again = len(decoder.blocks) - to_do  # blocks whose hidden states are computed once more
    seconds = to_do * (3 * read + passes + flop / _rate(decoder.device) / ranks.world) + again * (read + passes / 2)
    return Needs(memory, to_write + spill * ranks.world * hidden, seconds)


def check(needs: Needs, device: torch.device, folder: Path) -> None:
    """Refuse work that does not fit.

    Raises:
        NotEnoughMemoryError, OutputError: it needs more memory, or disk, than is free.
    """
    files.check_space(folder, needs.disk)
    sharing_it = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    if needs.memory > (free := available_memory(device) // sharing_it):
        raise NotEnoughMemoryError(
            f"the work takes about {needs.memory / 1e9:.2f} GB of memory, found {free / 1e9:.2f} GB free; put hidden "
            "states on disk (--spill), take fewer or shorter windows or a smaller --batch-size, or try it with --force"
        )


def _solve(groups: list[list[tuple[int, int]]], settings: Settings) -> tuple[int, float]:
    """Bytes that the largest solve works with, and floating point operations of all of a block."""
    method, most, flop = find(settings.method), 0, 0.0
    for shapes in groups:
        d_out, d_in = sum(rows for rows, _ in shapes), shapes[0][1]
        if method.needs == "hessian":
            squares, copies = (1, 4) if method.sweeps else (3, 6)  # of the Hessian, and of the weights
            most = max(most, 4 * (squares * d_in * d_in + copies * d_out * d_in))
        flop += method.flop(d_out, d_in) / _SHARE_OF_RATE
        if settings.measure_error:
            flop += 4 * d_out * d_in**2
    return most, flop


def _rate(device: torch.device) -> float:
    """Floating point operations a second of a float32 product."""
    a = torch.ones(_RATE_SIZE, _RATE_SIZE, device=device)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        taken.append(time.perf_counter() - started)
    return 2 * _RATE_SIZE**3 / min(taken)
