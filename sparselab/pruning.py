"""The block walk: calibrate a block, solve its layers, store the result, send the hidden states on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sparselab import solvers
from sparselab.errors import SparselabError
from sparselab.memory import PeakMemory
from sparselab.models.blocks import Call, Decoder, Linear, evaluating, find_linears, read_weight, write_weight
from sparselab.models.inputs import batches, check_tokens
from sparselab.models.recording import collect_statistics, shared_tensors
from sparselab.solvers import InputStatistics, Pattern


@dataclass(frozen=True)
class Settings:
    """What is done to each layer.

    Args:
        method: a key of `METHODS`.
        pattern: which fraction goes, or N:M.
        percdamp, blocksize: of SparseGPT; see `solvers.sparsegpt`.
        propagate: "pruned": each block is calibrated on what the pruned blocks before it send on (as in the paper);
            "dense": on what the dense ones would send.
        measure_error: report each layer's error also where the method itself could do without a Hessian.
    """

    method: str = "sparsegpt"
    pattern: Pattern = field(default_factory=lambda: solvers.Unstructured(0.5))
    percdamp: float = 0.01
    blocksize: int = 128
    propagate: Literal["pruned", "dense"] = "pruned"
    measure_error: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, received {self.method!r}")
        if self.propagate not in ("pruned", "dense"):
            raise ValueError(f"propagate: expected 'pruned' or 'dense', received {self.propagate!r}")
        solvers.check_percdamp(self.percdamp)
        solvers.check_blocksize(self.blocksize)


class Method(NamedTuple):
    """A pruning method: its solver, and what it has to know of a layer's inputs.

    Args:
        solve: (weight [d_out, d_in], statistics of its inputs, settings) to a new weight.
        needs: the least that has to be collected.
    """

    solve: Callable[[Float[Tensor, "d_out d_in"], InputStatistics, Settings], Float[Tensor, "d_out d_in"]]
    needs: Literal["nothing", "feature norms", "hessian"]


METHODS: dict[str, Method] = {
    "magnitude": Method(lambda weight, _, to: solvers.magnitude(weight, to.pattern), "nothing"),
    "wanda": Method(lambda weight, seen, to: solvers.wanda(weight, seen.feature_norm, to.pattern), "feature norms"),
    "sparsegpt": Method(
        lambda weight, seen, to: solvers.sweep(weight, seen.factor(to.percdamp), to.pattern, to.blocksize), "hessian"
    ),
}


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
        """Mean relative error over layers."""
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
    progress: bool = True,
) -> Report:
    """Prune the linear layers of every decoder block in place; embeddings and head are left alone.

    Nothing is changed before all arguments, tokens and weights have been checked. If a layer fails later, the
    blocks before it are already pruned: load the model again.

    Args:
        model: a `transformers` causal language model on any device, in float32, float16 or bfloat16.
        calib: LongTensor [n, seqlen], a list of rows, a DataLoader, or a list of `(input, target)` pairs; may be
            None for magnitude, whose layer errors are then not known.
        method: "sparsegpt", "wanda" or "magnitude".
        sparsity: 0.5, "50%", "2:4" or a pattern.
        percdamp, blocksize, propagate, measure_error: see `Settings`.
        batch_size: windows in one forward pass; None chooses by the device. Memory, not results, depends on it.
        progress: show a bar.

    Returns:
        A report with one row a layer.

    Raises:
        ValueError: an argument is wrong, or the tokens do not fit the model.
        UnsupportedModelError: no decoder blocks are found.
        NonFiniteError: weights or inputs are NaN or infinite; the layer is named.
        SingularHessianError: a damped Hessian is not positive definite; the layer is named.
    """
    settings = Settings(
        method, solvers.parse_sparsity(sparsity), percdamp, blocksize, propagate, measure_error and calib is not None
    )
    if calib is None and METHODS[method].needs != "nothing":
        raise ValueError(f"calib: {method} needs calibration windows, received None; see calibration_tokens")
    decoder = Decoder(model)
    _check_layers(decoder, settings)
    windows = None if calib is None else check_tokens(decoder, calib)
    started = time.perf_counter()
    rows = []
    with evaluating(model), PeakMemory(decoder.device) as memory:
        streams = [] if windows is None or _collects(settings) == "nothing" else _enter(decoder, windows, batch_size)
        for index in _blocks(decoder, f"{method} {settings.pattern}", progress):
            rows += _prune_block(decoder, index, streams, settings)
    return Report(pd.DataFrame(rows), settings, time.perf_counter() - started, memory.bytes)


def collect(
    model: PreTrainedModel, calib: Any, batch_size: int | None = None, progress: bool = True
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every prunable layer of the model as it is, in one pass, by full layer name.

    All Hessians are held at once; layers that see the same input share one.

    Args:
        model, calib, batch_size, progress: see `prune`.

    Raises:
        ValueError, SparselabError: see `prune`.
    """
    decoder = Decoder(model)
    windows = check_tokens(decoder, calib)
    collected = {}
    with evaluating(model):
        streams = _enter(decoder, windows, batch_size)
        for index in _blocks(decoder, "statistics", progress):
            outputs: list[Tensor] = []
            statistics = _observe(decoder, index, streams, True, outputs)
            collected.update({f"{decoder.blocks_name}.{index}.{name}": seen for name, seen in statistics.items()})
            _advance(decoder, index, streams, outputs)
    return collected


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
) -> dict[str, InputStatistics]:
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


def _prune_block(decoder: Decoder, index: int, streams: list[_Stream], settings: Settings) -> list[dict[str, Any]]:
    outputs: list[Tensor] | None = [] if settings.propagate == "dense" else None
    statistics: dict[str, InputStatistics] = {}
    if streams:
        statistics = _observe(decoder, index, streams, _collects(settings) == "hessian", outputs)
    rows = []
    for name, linear in find_linears(decoder.blocks[index]).items():
        try:
            rows.append({"block": index, "layer": name} | _prune_layer(linear, statistics.get(name), settings))
        except SparselabError as error:
            raise type(error)(f"{decoder.blocks_name}.{index}.{name}: {error}") from error
    _advance(decoder, index, streams, outputs)
    return rows


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


def _blocks(decoder: Decoder, what: str, progress: bool) -> Iterable[int]:
    return tqdm(range(len(decoder.blocks)), desc=what, unit="block", disable=not progress)


def _check_layers(decoder: Decoder, settings: Settings) -> None:
    """Everything that can be known to fail before the first block is touched."""
    for name, linear in decoder.linears().items():
        try:
            weight = read_weight(linear)
            solvers.check_weight(weight)
            whole = settings.blocksize if settings.method == "sparsegpt" else weight.shape[1]
            settings.pattern.check(weight.shape[1], whole)
        except (SparselabError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
