"""Calibration: hidden states on their way from block to block, and the statistics of what enters each layer."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.models.blocks import Call, Decoder, evaluating
from sparselab.models.inputs import batches, check_tokens
from sparselab.models.recording import AllInputsSeen, collect_statistics, shared_tensors
from sparselab.progress import Progress, tracked
from sparselab.resources import Stopwatch
from sparselab.solvers import InputStatistics

# Statistics of layers' inputs by full layer name; layers that see one input share one object.
Collected = dict[str, InputStatistics]


def collect(
    model: PreTrainedModel,
    calib: Any,
    batch_size: int | None = None,
    progress: Progress = True,
    *,
    blocks: Collection[int] | None = None,
) -> Collected:
    """Statistics of the inputs of every prunable layer of the model as it is, in one pass, by full layer name.

    All Hessians are held at once; layers that see the same input share one.

    Args:
        model, calib, batch_size: see `prune`.
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
    collected = {}
    with evaluating(model), tracked(progress, len(wanted), "statistics", "block") as advance:
        streams = enter(decoder, windows, batch_size)
        for index in range(max(wanted, default=-1) + 1):
            outputs: list[Tensor] | None = [] if index < max(wanted) else None
            if index in wanted:
                statistics = observe(decoder, index, streams, True, outputs)
                collected.update({f"{decoder.blocks_name}.{index}.{name}": seen for name, seen in statistics.items()})
                advance(1)
            advance_streams(decoder, index, streams, outputs)
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


@dataclass
class Stream:
    """One batch on its way through the model: the hidden states it has come to, and how to call each block."""

    hidden: Float[Tensor, "batch seq hidden"]
    calls: list[Call]


def enter(decoder: Decoder, windows: Int[Tensor, "n seqlen"], batch_size: int | None) -> list[Stream]:
    """Everything before block 0, on all windows, in batches."""
    streams: list[Stream] = []
    for batch in batches(windows, batch_size, decoder.device):
        hidden, calls = decoder.embed(batch)
        # Masks and rotary tables are the same for most batches; keep them once.
        calls = shared_tensors(calls, streams[-1].calls) if streams else calls
        streams.append(Stream(hidden, calls))
    return streams


def observe(
    decoder: Decoder,
    index: int,
    streams: list[Stream],
    with_hessian: bool,
    outputs: list[Tensor] | None,
    watch: Stopwatch | None = None,
) -> Collected:
    """Run a block on all batches and sum up what enters its layers, by their names in the block.

    Args:
        decoder, index, streams: which block, and what enters it.
        with_hessian: see `InputStatistics`.
        outputs: what the block sends on is added to this list; None if nobody asks, which saves its last product.
        watch: see `collect_statistics`.
    """
    name = f"{decoder.blocks_name}.{index}"
    with collect_statistics(decoder.blocks[index], name, with_hessian, outputs is None, watch) as statistics:
        for stream in streams:
            with suppress(AllInputsSeen):
                output = decoder.run_block(index, stream.hidden, stream.calls[index])
                if outputs is not None:
                    outputs.append(output)
    return statistics


def advance_streams(decoder: Decoder, index: int, streams: list[Stream], outputs: list[Tensor] | None) -> None:
    """Move every stream on to the next block: by outputs already at hand, or by running the block as it is now."""
    if index + 1 == len(decoder.blocks):
        return
    for number, stream in enumerate(streams):
        stream.hidden = outputs[number] if outputs else decoder.run_block(index, stream.hidden, stream.calls[index])
