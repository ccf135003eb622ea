"""The block walk: calibrate a block, solve its layers, store the result, send the hidden states on."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab import solvers
from sparselab.errors import NonFiniteError, SparselabError
from sparselab.memory import PeakMemory
from sparselab.methods import METHODS, Settings
from sparselab.models.blocks import Call, Decoder, Linear, evaluating, find_linears, read_weight, write_weight
from sparselab.models.inputs import batches, check_tokens
from sparselab.models.recording import collect_statistics, shared_tensors
from sparselab.progress import Progress, tracked
from sparselab.solvers import InputStatistics, Pattern
from sparselab.solvers.checks import all_finite

# Statistics of layers' inputs by full layer name; layers that see one input share one object.
Collected = dict[str, InputStatistics]


@dataclass(frozen=True)
class Report:
    """What pruning did, and what it cost.

    Args:
        layers: one row a layer: block, layer, d_out, d_in, sparsity (realised), relative_error (of the layer's outputs
            on its calibration inputs, against the dense weight), tokens, seconds (of the solve).
        settings: what was asked for.
        seconds: wall time of the whole walk.
        peak_memory: bytes taken besides the model; see `PeakMemory`.
    """

    layers: pd.DataFrame
    settings: Settings
    seconds: float
    peak_memory: int

    @property
    def sparsity(self) -> float:
        """Realised sparsity over all pruned layers, weighted by their size."""
        sizes = self.layers.d_out * self.layers.d_in
        return float((self.layers.sparsity * sizes).sum() / sizes.sum())

    @property
    def relative_error(self) -> float:
        """Mean relative error over the layers whose dense outputs are not all zero."""
        return float(self.layers.relative_error.mean())


def prune(
    model: PreTrainedModel,
    calib: Any = None,
    method: str = "sparsegpt",
    sparsity: float | str | Pattern = 0.5,
    percdamp: float = 0.01,
    blocksize: int = 128,
    *,
    propagate: Literal["pruned", "dense"] = "pruned",
    measure_error: bool = True,
    batch_size: int | None = None,
    progress: Progress = True,
) -> Report:
    """Prune the linear layers of every decoder block in place; embeddings and head are left alone.

    Nothing is changed before all arguments, tokens and weights have been checked. If a layer fails later, the
    blocks before it are already pruned: load the model again.

    Args:
        model: a `transformers` causal language model on any device, in float32, float16 or bfloat16.
        calib: LongTensor [n, seqlen], a list of rows, a DataLoader, or a list of `(input, target)` pairs; or what
            `collect` made of such windows and the dense model, which then serves any number of runs without another
            forward pass (`propagate` is "dense" then). May be None for magnitude, whose layer errors are then not
            known.
        method: "sparsegpt", "wanda" or "magnitude".
        sparsity: 0.5, "50%", "2:4" or a pattern.
        percdamp, blocksize, propagate, measure_error: see `Settings`.
        batch_size: windows in one forward pass; None chooses by the device. Memory, not results, depends on it.
        progress: a bar over layers; see `sparselab.progress`.

    Returns:
        A report with one row a layer.

    Raises:
        ValueError: an argument is wrong, or the tokens do not fit the model.
        TypeError: an argument is of the wrong kind.
        UnsupportedModelError: no decoder blocks are found, or they keep weights outside of linear layers.
        NonFiniteError: weights, inputs or outputs are NaN or infinite; the layer is named.
        SingularHessianError: a damped Hessian is not positive definite; the layer is named.
    """
    collected = calib if isinstance(calib, dict) else None
    pattern = solvers.parse_sparsity(sparsity)
    view = propagate if collected is None else "dense"
    settings = Settings(method, pattern, percdamp, blocksize, view, measure_error and calib is not None)
    if calib is None and METHODS[method].needs != "nothing":
        raise ValueError(f"calib: {method} needs calibration windows, received None; see calibration_tokens")
    decoder = check_model(model, settings, collected)
    windows = None if calib is None or collected is not None else check_tokens(decoder, calib)
    rows = []
    with (
        evaluating(model),
        PeakMemory(decoder.device) as memory,
        tracked(progress, len(decoder.linears()), f"{method} {pattern}", "layer") as advance,
    ):
        started = time.perf_counter()
        streams = [] if windows is None or _collects(settings) == "nothing" else _enter(decoder, windows, batch_size)
        for index in range(len(decoder.blocks)):
            for row in _prune_block(decoder, index, streams, settings, collected or {}):
                rows.append(row)
                advance(1)
        seconds = time.perf_counter() - started
    return Report(pd.DataFrame(rows), settings, seconds, memory.bytes)


def check_model(model: PreTrainedModel, settings: Settings, collected: Collected | None = None) -> Decoder:
    """The model taken apart, once everything that can be known to fail in pruning it has been looked at.

    Args:
        model: the model; not changed.
        settings: what would be done to it.
        collected: statistics that would be used, if they are at hand.

    Raises:
        ValueError, SparselabError: see `prune`.
    """
    decoder = Decoder(model)
    decoder.check_prunable()
    _check_layers(decoder, settings, collected)
    _check_other_parameters(decoder)
    return decoder


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
        streams = _enter(decoder, windows, batch_size)
        for index in range(max(wanted, default=-1) + 1):
            outputs: list[Tensor] = []
            if index in wanted:
                statistics = _observe(decoder, index, streams, True, outputs)
                collected.update({f"{decoder.blocks_name}.{index}.{name}": seen for name, seen in statistics.items()})
                advance(1)
            _advance(decoder, index, streams, outputs)
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
class _Stream:
    """One batch on its way through the model: the hidden states it has come to, and how to call each block."""

    hidden: Float[Tensor, "batch seq hidden"]
    calls: list[Call]


def _enter(decoder: Decoder, windows: Int[Tensor, "n seqlen"], batch_size: int | None) -> list[_Stream]:
    streams: list[_Stream] = []
    for batch in batches(windows, batch_size, decoder.device):
        hidden, calls = decoder.embed(batch)
        # Masks and rotary tables are the same for most batches; keep them once.
        calls = shared_tensors(calls, streams[-1].calls) if streams else calls
        streams.append(_Stream(hidden, calls))
    return streams


def _observe(
    decoder: Decoder, index: int, streams: list[_Stream], with_hessian: bool, outputs: list[Tensor] | None
) -> Collected:
    """Run a block on all batches and sum up what enters its layers; what it sends on is added to `outputs` if given."""
    name = f"{decoder.blocks_name}.{index}"
    with collect_statistics(decoder.blocks[index], name, with_hessian) as statistics:
        for stream in streams:
            output = decoder.run_block(index, stream.hidden, stream.calls[index])
            if outputs is not None:
                outputs.append(output)
    return statistics


def _advance(decoder: Decoder, index: int, streams: list[_Stream], outputs: list[Tensor] | None) -> None:
    """Move every stream on to the next block: by outputs already at hand, or by running the block as it is now."""
    if index + 1 == len(decoder.blocks):
        return
    for number, stream in enumerate(streams):
        stream.hidden = outputs[number] if outputs else decoder.run_block(index, stream.hidden, stream.calls[index])


def _prune_block(
    decoder: Decoder, index: int, streams: list[_Stream], settings: Settings, collected: Collected
) -> Iterator[dict[str, Any]]:
    """Prune the layers of a block one by one; the hidden states have moved on when the last row has come."""
    block_name = f"{decoder.blocks_name}.{index}"
    outputs: list[Tensor] | None = [] if settings.propagate == "dense" else None
    observed: Collected = {}
    if streams:
        observed = _observe(decoder, index, streams, _collects(settings) == "hessian", outputs)
    for name, linear in find_linears(decoder.blocks[index]).items():
        seen = observed.get(name) or collected.get(f"{block_name}.{name}")
        try:
            yield {"block": index, "layer": name} | _prune_layer(linear, seen, settings)
        except SparselabError as error:
            raise type(error)(f"{block_name}.{name}: {error}") from error
    _advance(decoder, index, streams, outputs)


def _prune_layer(linear: Linear, seen: InputStatistics | None, settings: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    weight = read_weight(linear)
    seen = seen or InputStatistics(weight.shape[1], with_hessian=False)  # no tokens: magnitude asks for none
    pruned = METHODS[settings.method].solve(weight, seen, settings)
    error = (
        solvers.relative_error(weight, pruned, seen.hessian)
        if seen.tokens and _collects(settings) == "hessian"
        else float("nan")
    )
    write_weight(linear, pruned)
    d_out, d_in = weight.shape
    return {
        "d_out": d_out,
        "d_in": d_in,
        "sparsity": solvers.realised_sparsity(pruned),
        "relative_error": error,
        "tokens": seen.tokens,
        "seconds": time.perf_counter() - started,
    }


def _collects(settings: Settings) -> str:
    return "hessian" if settings.measure_error else METHODS[settings.method].needs


def _check_layers(decoder: Decoder, settings: Settings, collected: Collected | None) -> None:
    """Everything that can be known to fail before the first block is touched."""
    linears = decoder.linears()
    if collected is not None and (lacking := [name for name in linears if name not in collected]):
        raise ValueError(
            f"calib: expected statistics of all {len(linears)} layers, as collect gives without `blocks`; "
            f"received none of {lacking[0]}"
        )
    for name, linear in linears.items():
        try:
            weight = read_weight(linear)
            solvers.check_weight(weight)
            whole = settings.blocksize if settings.method == "sparsegpt" else weight.shape[1]
            settings.pattern.check(weight.shape[1], whole)
        except (SparselabError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


def _check_other_parameters(decoder: Decoder) -> None:
    """What is not pruned has to be finite too, or a damaged model would be written; one tensor at a time."""
    linears = decoder.linears()
    for name, parameter in decoder.model.named_parameters():
        checked = name.removesuffix(".weight") in linears or not parameter.is_floating_point()
        if not checked and not all_finite(parameter):
            raise NonFiniteError(f"{name}: expected finite values, received NaN or infinite ones; load the model again")
