"""The bundled model under study: what its layers cost when they are pruned one at a time, and all together.

Everything here is measured once for each draw of calibration text, and kept on disk; see `files.cache_folder`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparselab import __version__, solvers
from sparselab.calibration import Collected, Stream, advance_streams, collect, enter
from sparselab.corpora import calibration_tokens, evaluation_tokens
from sparselab.evaluation import perplexity
from sparselab.files import cache_folder, write_text
from sparselab.models.blocks import Decoder, read_weight, write_weight
from sparselab.models.loading import load

SPARSITIES = (0.6, 0.65, 0.7, 0.75, 0.8)
MEASURED_AT = 4  # the index of the sparsity at which a layer is pruned alone: the largest, where the loss moves most
UNIFORM = 0.7  # the budget: what all layers lose in the pruning that is to be beaten
DRAWS = 2
HELD_OUT = 48  # windows to measure on
_CALIBRATION = 32  # windows to prune by
_BEGINNING = 64  # tokens of each, on which the loss of a layer pruned alone is measured: many texts, a little of each


class Layers(NamedTuple):
    """What one draw of calibration text says about the layers of `tiny`; SparseGPT on the dense model's inputs.

    Args:
        names: of all layers that are pruned.
        sizes: weights of each.
        sparsities: at which each was pruned.
        errors: layer error tr((W−Ŵ) H (W−Ŵ)ᵀ) [layers, sparsities].
        energies: tr(W H Wᵀ) [layers]: relative errors are relative to this.
        losses: by how much the loss per token rises, in nats, when this layer alone is pruned at the largest
            sparsity [layers]; on calibration text.
    """

    names: list[str]
    sizes: list[int]
    sparsities: tuple[float, ...]
    errors: Tensor
    energies: Tensor
    losses: Tensor


@cache
def measured_layers(draw: int) -> Layers:
    """Prune each layer of `tiny` at each sparsity and measure what that does to its outputs, and to the loss."""
    names, sizes, errors, energies, losses = _kept("layers", draw, lambda: _measured(draw))
    return Layers(names, sizes, SPARSITIES, torch.tensor(errors), torch.tensor(energies), torch.tensor(losses))


@cache
def heldout_loss(draw: int, sparsities: tuple[float, ...]) -> Tensor:
    """Loss per token [windows] of `tiny` on held-out text, each of its layers pruned at a sparsity of its own."""
    return torch.tensor(_kept("loss", draw, lambda: _loss(draw, sparsities), sparsities))


def prepare() -> None:
    """Measure all that does not depend on an answer."""
    for draw in range(DRAWS):
        heldout_loss(draw, (UNIFORM,) * len(measured_layers(draw).sizes))


def _kept(what: str, draw: int, measure: Callable[[], Any], *more: Any) -> Any:
    """What was measured before of the same model, text and code; else what is measured now, for another time."""
    tensors = (_model().state_dict()["model.embed_tokens.weight"], _calibration(draw), _held_out())
    parts = [tensor.detach().numpy().tobytes() for tensor in tensors]
    parts += [repr((__version__, torch.__version__, more)).encode(), Path(__file__).read_bytes()]
    path = cache_folder() / f"{what}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):  # not there, or damaged
        return json.loads(path.read_text(encoding="utf-8"))
    measured = measure()
    with suppress(OSError):  # no place to keep it: then it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(measured))
    return measured


def _measured(draw: int) -> list[Any]:
    """The fields of `Layers` but for the sparsities, as lists."""
    decoder, statistics = Decoder(_model()), _collected(draw)
    weights = {name: read_weight(linear).clone() for name, linear in decoder.linears().items()}
    errors = []
    for name, weight in weights.items():
        pruned = [_pruned(draw, name, weight, sparsity) for sparsity in SPARSITIES]
        errors.append([solvers.layer_error(weight, each, statistics[name].hessian) for each in pruned])
    energies = [solvers.layer_error(weight, 0 * weight, statistics[name].hessian) for name, weight in weights.items()]
    sizes = [weight.numel() for weight in weights.values()]
    return [list(weights), sizes, errors, energies, _losses_alone(decoder, draw, weights)]


def _loss(draw: int, sparsities: tuple[float, ...]) -> list[float]:
    linears = Decoder(_model()).linears()
    weights = {name: read_weight(linear).clone() for name, linear in linears.items()}
    try:
        for (name, weight), sparsity in zip(weights.items(), sparsities, strict=True):
            write_weight(linears[name], _pruned(draw, name, weight, sparsity))
        losses: list[float] = perplexity(_model(), _held_out(), progress=False).nll.tolist()
        return losses
    finally:
        for name, weight in weights.items():
            write_weight(linears[name], weight)


def _losses_alone(decoder: Decoder, draw: int, weights: dict[str, Tensor]) -> list[float]:
    """The blocks before the pruned layer see and send on what they do in the dense model, so they are run once."""
    windows = _calibration(draw)[:, :_BEGINNING]
    streams = enter(decoder, windows, None)
    linears, losses = decoder.linears(), []
    dense = _loss_from(decoder, 0, streams, windows)
    for index in range(len(decoder.blocks)):
        for name in (name for name in weights if name.startswith(decoder.block_prefix(index))):
            write_weight(linears[name], _pruned(draw, name, weights[name], SPARSITIES[MEASURED_AT]))
            losses.append(_loss_from(decoder, index, streams, windows) - dense)
            write_weight(linears[name], weights[name])
        advance_streams(decoder, index, streams)
    return losses


@torch.no_grad()
def _loss_from(decoder: Decoder, first: int, streams: Sequence[Stream], windows: Tensor) -> float:
    """Mean loss per token from the states that enter a block, which stay as they are."""
    copies = [Stream(stream.hidden, stream.calls) for stream in streams]
    for index in range(first, len(decoder.blocks)):
        advance_streams(decoder, index, copies)
    logits = torch.cat([decoder.head(stream.hidden) for stream in copies])
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def _pruned(draw: int, name: str, weight: Tensor, sparsity: float) -> Tensor:
    return solvers.sweep(weight, _collected(draw)[name].factor(0.01), sparsity)


@cache
def _model() -> PreTrainedModel:
    return load("tiny", "cpu")[0]


@cache
def _calibration(draw: int) -> Tensor:
    return calibration_tokens(load("tiny", "cpu")[1], nsamples=_CALIBRATION, seed=draw)


@cache
def _held_out() -> Tensor:
    return evaluation_tokens(load("tiny", "cpu")[1], nsamples=HELD_OUT)


@cache
def _collected(draw: int) -> Collected:
    return collect(_model(), _calibration(draw), progress=False)
