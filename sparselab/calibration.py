"""Calibration: hidden states on their way from block to block, and the statistics of what enters each layer."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.models.blocks import Call, Decoder, evaluating
from sparselab.models.inputs import batches, check_tokens
from sparselab.models.recording import AllInputsSeen, collect_statistics, shared_tensors
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress, tracked
from sparselab.resources import Stopwatch
from sparselab.solvers import InputStatistics

# Statistics of layers' inputs by full layer name; layers that see one input share one object.
Collected = dict[str, InputStatistics]


def collect(
    model: PreTrainedModel | StreamedModel,
    calib: Any,
    batch_size: int | None = None,
    progress: Progress = True,
    *,
    blocks: Collection[int] | None = None,
) -> Collected:
    """Statistics of the inputs of every prunable layer of the model as it is, in one pass, by full layer name.

    All Hessians are held at once; layers that see the same input share one.

    Args:
        model, calib, batch_size: see `prune`. All processes of a partitioned model have to make this call alike.
        progress: a bar over blocks; see `sparselab.progress`.
        blocks: indices of the blocks to collect, to save memory; None is all.

    Raises:
        ValueError, SparselabError: see `prune`.
    """
    decoder = Decoder(model)
    decoder.check_prunable()
    windows = check_tokens(decoder, calib)
    wanted = set(range(len(decoder.blocks)) if blocks is None else blocks)
    if unknown := wanted - set(range(len(decoder.blocks))):
        raise ValueError(f"blocks: expected indices from 0 to {len(decoder.blocks) - 1}, received {sorted(unknown)}")
    collected: Collected = {}
    with evaluating(decoder.model), tracked(progress, len(wanted), "statistics", "block") as advance:
        streams = enter(decoder, windows, batch_size)
        for index in range(max(wanted, default=-1) + 1):
            goes_on, is_wanted = index < max(wanted), index in wanted
            with decoder.block(index):
                if is_wanted:
                    statistics = observe(decoder, index, streams, True, goes_on)
                    collected |= {f"{decoder.block_prefix(index)}{name}": seen for name, seen in statistics.items()}
                    advance(1)
                if goes_on:
                    advance_streams(decoder, index, streams, is_wanted)
    return collected


def collect_nested(
    model: PreTrainedModel,
    calib: Any,
    sizes: Sequence[int],
    batch_size: int | None = None,
    progress: Progress = True,
    *,
    blocks: Collection[int] | None = None,
) -> dict[int, Collected]:
    """`collect` on the first n windows for each n of `sizes`, in one pass over the largest: sums add up.

    Args:
        model, calib, batch_size, blocks: see `collect`.
        sizes: numbers of windows, in any order.
        progress: a bar over blocks and sizes; see `sparselab.progress`.

    Raises:
        ValueError: a size is not positive, or there are fewer windows; see also `collect`.
    """
    decoder = Decoder(model)
    windows = check_tokens(decoder, calib)
    ordered = sorted(set(sizes))
    if not ordered or ordered[0] < 1 or ordered[-1] > len(windows):
        raise ValueError(f"sizes: expected numbers from 1 to the {len(windows)} windows, received {list(sizes)}")
    nested: dict[int, Collected] = {}
    with tracked(progress, len(ordered), "statistics", "size") as advance:
        for start, stop in pairwise([0, *ordered]):
            part = collect(model, windows[start:stop], batch_size, progress=False, blocks=blocks)
            nested[stop] = _added(nested[start], part) if start else part
            advance(1)
    return nested


def _added(before: Collected, part: Collected) -> Collected:
    """Sums of two sets of windows, shared between layers as theirs are."""
    sums: dict[int, InputStatistics] = {}
    for name, seen in part.items():
        if id(seen) not in sums:
            seen.merge(before[name])
            sums[id(seen)] = seen
    return part


class Stream:
    """One batch on its way through the model: the hidden states it has come to, and how to call each block.

    Args:
        hidden: the states [batch, seq, hidden].
        calls: one for each block.
        file: where to keep the states meanwhile; None keeps them in memory.
    """

    def __init__(self, hidden: Float[Tensor, "batch seq hidden"], calls: list[Call], file: Path | None = None) -> None:
        self.calls, self._file, self._device = calls, file, hidden.device
        self.hidden = hidden

    @property
    def hidden(self) -> Float[Tensor, "batch seq hidden"]:
        """The states at the block that comes next."""
        if self._file is None:
            return self._hidden
        return load_file(self._file, device=str(self._device))["hidden"]

    @hidden.setter
    def hidden(self, states: Float[Tensor, "batch seq hidden"]) -> None:
        self.foresee(states)
        self.move_on()

    def foresee(self, states: Float[Tensor, "batch seq hidden"]) -> None:
        """Keep the states at the block after the next one, which still has to look at the present ones."""
        if self._file is None:
            self._foreseen = states
        else:
            save_file({"hidden": states.contiguous()}, self._file.with_suffix(".next"))

    def move_on(self) -> None:
        """Come to the states that were foreseen."""
        if self._file is None:
            self._hidden = self._foreseen
            del self._foreseen
        else:
            self._file.with_suffix(".next").replace(self._file)


def enter(
    decoder: Decoder, windows: Int[Tensor, "n seqlen"], batch_size: int | None, spill: Path | None = None
) -> list[Stream]:
    """Everything before block 0, on all windows, in batches.

    Args:
        decoder, windows: the model, and what enters it.
        batch_size: windows at a time; None chooses by the device.
        spill: an empty folder for the hidden states; None keeps them in memory.
    """
    streams: list[Stream] = []
    with decoder.outside(head=False), decoder.block(0):
        for batch in batches(windows, batch_size, decoder.device):
            hidden, calls = decoder.embed(batch)
            # Masks and rotary tables are the same for most batches; keep them once.
            calls = shared_tensors(calls, streams[-1].calls) if streams else calls
            streams.append(Stream(hidden, calls, spill and spill / f"{len(streams)}.safetensors"))
    return streams


def observe(
    decoder: Decoder,
    index: int,
    streams: list[Stream],
    with_hessian: bool,
    foresee: bool,
    watch: Stopwatch | None = None,
    only: Collection[str] | None = None,
) -> Collected:
    """Run a block on all batches and sum up what enters its layers, by their names in the block.

    Args:
        decoder, index, streams: which block, and what enters it.
        with_hessian: see `InputStatistics`.
        foresee: keep what the block sends on, for `advance_streams`; without, its last product is saved.
        watch, only: see `collect_statistics`.
    """
    name = decoder.block_prefix(index).removesuffix(".")
    with collect_statistics(decoder.blocks[index], name, with_hessian, not foresee, watch, only) as statistics:
        for stream in streams:
            with suppress(AllInputsSeen):
                output = decoder.run_block(index, stream.hidden, stream.calls[index])
                if foresee:
                    stream.foresee(output)
    return statistics


def advance_streams(decoder: Decoder, index: int, streams: list[Stream], foreseen: bool = False) -> None:
    """Move every stream past a block: to what `observe` has foreseen, or by running the block as it is now."""
    for stream in streams:
        if foreseen:
            stream.move_on()
        else:
            stream.hidden = decoder.run_block(index, stream.hidden, stream.calls[index])
