"""The block walk: calibrate a block, solve its layers, store the result, send the hidden states on."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from sparselab import solvers
from sparselab.calibration import Collected, Stream, advance_streams, enter, observe
from sparselab.errors import NonFiniteError, SparselabError
from sparselab.methods import METHODS, Settings
from sparselab.models.blocks import Decoder, Linear, evaluating, find_linears, read_weight, write_weight
from sparselab.models.inputs import check_tokens
from sparselab.progress import Progress, tracked
from sparselab.resources import PeakMemory, Stopwatch
from sparselab.solvers import InputStatistics, Pattern
from sparselab.solvers.checks import all_finite


@dataclass(frozen=True)
class Report:
    """What pruning did, and what it cost.

    Args:
        layers: one row a layer: block, layer, d_out, d_in, sparsity (realised), relative_error (of the layer's outputs
            on its calibration inputs, against the dense weight), tokens, seconds (of the solve; layers that see the
            same inputs are solved together, and share the time by their size).
        settings: what was asked for.
        seconds: wall time of the whole walk.
        stages: seconds of it by what they went into: forward passes, statistics, factorise, sweep (the solve, of
            whatever method), error (measuring it).
        peak_memory: bytes taken besides the model; see `PeakMemory`.
    """

    layers: pd.DataFrame
    settings: Settings
    seconds: float
    stages: dict[str, float]
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
    kernel: solvers.Kernel = "auto",
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
        percdamp, blocksize, propagate, measure_error, kernel: see `Settings`.
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
    settings = Settings(method, pattern, percdamp, blocksize, view, measure_error and calib is not None, kernel)
    if calib is None and METHODS[method].needs != "nothing":
        raise ValueError(f"calib: {method} needs calibration windows, received None; see calibration_tokens")
    decoder = check_model(model, [settings], collected)
    windows = None if calib is None or collected is not None else check_tokens(decoder, calib)
    rows = []
    with (
        evaluating(model),
        PeakMemory(decoder.device) as memory,
        tracked(progress, len(decoder.linears()), f"{method} {pattern}", "layer") as advance,
    ):
        started, watch = time.perf_counter(), Stopwatch(decoder.device)
        streams = []
        if windows is not None and _collects(settings) != "nothing":
            with watch.stage("forward"):
                streams = enter(decoder, windows, batch_size)
        for index in range(len(decoder.blocks)):
            for row in _prune_block(decoder, index, streams, settings, collected or {}, watch):
                rows.append(row)
                advance(1)
        stages, seconds = watch.seconds(), time.perf_counter() - started
    return Report(pd.DataFrame(rows), settings, seconds, stages, memory.bytes)


def check_model(model: PreTrainedModel, runs: Sequence[Settings], collected: Collected | None = None) -> Decoder:
    """The model taken apart, once everything that can be known to fail in pruning it has been looked at.

    Args:
        model: the model; not changed.
        runs: what would be done to it, each time from the weights that it has now, which are read once.
        collected: statistics that would be used, if they are at hand.

    Raises:
        ValueError, SparselabError: see `prune`.
    """
    decoder = Decoder(model)
    decoder.check_prunable()
    _check_layers(decoder, runs, collected)
    _check_other_parameters(decoder)
    return decoder


def _prune_block(
    decoder: Decoder, index: int, streams: list[Stream], settings: Settings, collected: Collected, watch: Stopwatch
) -> Iterator[dict[str, Any]]:
    """Prune the layers of a block; the hidden states have moved on when the last row has come."""
    block_name = f"{decoder.blocks_name}.{index}"
    linears = find_linears(decoder.blocks[index])
    last = index + 1 == len(decoder.blocks)
    outputs: list[Tensor] | None = [] if settings.propagate == "dense" and not last else None
    if streams:
        with watch.stage("forward"):
            observed = observe(decoder, index, streams, _collects(settings) == "hessian", outputs, watch)
    else:
        observed = {name: collected[full] for name in linears if (full := f"{block_name}.{name}") in collected}
    for names in _sharing(linears, observed):
        rows = _prune_layers([linears[name] for name in names], observed.get(names[0]), settings, watch)
        for name in names:
            try:
                yield {"block": index, "layer": name} | next(rows)
            except SparselabError as error:
                raise type(error)(f"{block_name}.{name}: {error}") from error
    with watch.stage("forward"):
        advance_streams(decoder, index, streams, outputs)


def _sharing(linears: dict[str, Linear], observed: Collected) -> list[list[str]]:
    """Names of layers that see the same inputs and keep their weights alike, in one list each; others alone."""
    groups: dict[Any, list[str]] = {}
    for name, linear in linears.items():
        key = (id(observed[name]), linear.weight.dtype, linear.weight.device) if name in observed else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _prune_layers(
    linears: list[Linear], seen: InputStatistics | None, settings: Settings, watch: Stopwatch
) -> Iterator[dict[str, Any]]:
    """Solve layers that see the same inputs together; store one after the other."""
    method, started = METHODS[settings.method], time.perf_counter()
    weights = [read_weight(linear) for linear in linears]
    seen = seen or InputStatistics(weights[0].shape[1], with_hessian=False)  # no tokens: magnitude asks for none
    if method.needs == "hessian":
        with watch.stage("factorise"):
            seen.factor(settings.percdamp)
    with watch.stage("sweep"):
        results = iter(method.solve(weights, seen, settings))
    size, taken = sum(weight.numel() for weight in weights), 0.0
    for linear, weight in zip(linears, weights, strict=True):
        with watch.stage("sweep"):
            pruned = next(results)  # which looks whether it is finite, so that on a GPU too it is done now
        taken = taken or time.perf_counter() - started
        d_out, d_in = weight.shape
        with watch.stage("error"):
            error = _relative_error(weight, pruned, seen, settings)
        write_weight(linear, pruned)
        yield {
            "d_out": d_out,
            "d_in": d_in,
            "sparsity": solvers.realised_sparsity(pruned),
            "relative_error": error,
            "tokens": seen.tokens,
            "seconds": taken * weight.numel() / size,
        }


def _relative_error(weight: Tensor, pruned: Tensor, seen: InputStatistics, settings: Settings) -> float:
    known = seen.tokens and _collects(settings) == "hessian"
    return solvers.relative_error(weight, pruned, seen.hessian) if known else float("nan")


def _collects(settings: Settings) -> str:
    return "hessian" if settings.measure_error else METHODS[settings.method].needs


def _check_layers(decoder: Decoder, runs: Sequence[Settings], collected: Collected | None) -> None:
    """Everything that can be known to fail before the first block is touched."""
    linears = decoder.linears()
    sweeps = [settings for settings in runs if settings.method == "sparsegpt"]
    for device in {linear.weight.device for linear in linears.values()}:
        for settings in sweeps:
            solvers.block_sweeper(settings.kernel, settings.blocksize, device)
    if collected is not None and (lacking := [name for name in linears if name not in collected]):
        raise ValueError(
            f"calib: expected statistics of all {len(linears)} layers, as collect gives without `blocks`; "
            f"received none of {lacking[0]}"
        )
    for name, linear in linears.items():
        try:
            weight = read_weight(linear)
            solvers.check_weight(weight)
            for settings in runs:
                whole = settings.blocksize if settings in sweeps else weight.shape[1]
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
