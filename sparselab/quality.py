"""How good pruned layers are: their error on calibrated and on other tokens, and the least that their masks allow."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.calibration import Stream, advance_streams, enter, observe
from sparselab.errors import naming
from sparselab.models.blocks import Decoder, evaluating, find_linears, read_weight, weight_shape, write_weight
from sparselab.models.inputs import check_tokens
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress, tracked
from sparselab.solvers import InputStatistics, optimality_gap, relative_error

Weights = dict[str, Float[Tensor, "d_out d_in"]]


def copy_weights(model: PreTrainedModel | StreamedModel) -> Weights:
    """The weights of all prunable layers by full name, to keep while the model is pruned.

    Args:
        model: as `prune` takes it. All processes of a partitioned model have to make this call alike.
    """
    decoder, weights = Decoder(model), {}
    for index in range(len(decoder.blocks)):
        with decoder.block(index) as block:
            for name, linear in find_linears(block).items():
                weights[f"{decoder.block_prefix(index)}{name}"] = read_weight(linear).clone()
    return weights


@contextmanager
def dense_again(model: PreTrainedModel, dense_weights: Weights) -> Iterator[None]:
    """Whatever is done inside to a model in memory, in the end its prunable layers have these weights.

    Args:
        model: a causal language model.
        dense_weights: of all prunable layers, from `copy_weights`.
    """
    try:
        yield
    finally:
        for name, linear in Decoder(model).linears().items():
            write_weight(linear, dense_weights[name])


def layer_quality(
    model: PreTrainedModel | StreamedModel,
    dense_weights: Mapping[str, Float[Tensor, "d_out d_in"]],
    calib: Any,
    held_out: Any = None,
    batch_size: int | None = None,
    progress: Progress = True,
) -> pd.DataFrame:
    """What became of each layer of a pruned model, on the inputs that this model itself sends it.

    One pass of each text through the blocks; statistics of one block are held at a time, undamped.

    Args:
        model: pruned, by whatever means; a kept weight is one that is not zero. Not changed.
        dense_weights: what its layers were before, by full name; `copy_weights` of the dense model.
        calib: windows that it was calibrated on, see `prune`.
        held_out: other windows; None leaves the error on them unknown.
        batch_size: windows at a time; None chooses by the device.
        progress: a bar over layers; see `sparselab.progress`.

    Returns:
        A row a layer:
        block, layer: which.
        calibration_error: of the layer's outputs on the calibration tokens, tr(ΔHΔᵀ) / tr(WHWᵀ) with Δ = W − Ŵ; NaN
            where the dense outputs are all zero.
        heldout_error: the same on held-out tokens. How far it lies above shows to what extent weights were fitted to
            the calibration text.
        optimality_gap: the layer's error on the calibration tokens over that of the best weights for the same mask:
            1 if these are the best. `solvers.refine` finds those, from the pruned ones on; where it does not come all
            the way, the gap is larger than this. Without meaning where there are fewer tokens than kept inputs, which
            leave the best weights no error; NaN where no weight was changed.
        residual: of the best weights, as `solvers.Refined` states it: how far they were from their optimum.

    Raises:
        ValueError: windows do not fit the model; weights are missing, or of other shapes.
        TypeError: no windows, or no such weights.
        SparselabError: see `collect`.
    """
    decoder = Decoder(model)
    decoder.check_prunable()
    _check_weights(decoder, dense_weights)
    texts = [check_tokens(decoder, windows) for windows in ([calib] if held_out is None else [calib, held_out])]
    rows: list[dict[str, Any]] = []
    with (
        evaluating(decoder.model),
        tracked(progress, len(decoder.linears()), "layer quality", "layer") as advance,
    ):
        streams = [enter(decoder, windows, batch_size) for windows in texts]
        for index in range(len(decoder.blocks)):
            for row in _block(decoder, index, streams, dense_weights):
                rows.append(row)
                advance(1)
    return pd.DataFrame(rows)


def _block(
    decoder: Decoder, index: int, streams: list[list[Stream]], dense_weights: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """The rows of a block; the streams of all texts have moved past it when the last has come."""
    goes_on, prefix = index + 1 < len(decoder.blocks), decoder.block_prefix(index)
    with decoder.block(index) as block:
        seen = [observe(decoder, index, each, True, goes_on) for each in streams]
        for name, linear in find_linears(block).items():
            dense = dense_weights[prefix + name].to(linear.weight.device)
            with naming(prefix + name):
                measured = _measured(dense, read_weight(linear), [each[name] for each in seen])
            yield {"block": index, "layer": name} | measured
        for each in streams if goes_on else ():
            advance_streams(decoder, index, each, foreseen=True)


def _measured(
    dense: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], seen: list[InputStatistics]
) -> dict[str, float]:
    """The numbers of one layer, from what entered it of each text."""
    row = dict.fromkeys(("calibration_error", "heldout_error", "optimality_gap", "residual"), math.nan)
    for column, statistics in zip(row, seen, strict=False):
        row[column] = relative_error(dense, pruned, statistics.hessian)
    row["optimality_gap"], row["residual"] = optimality_gap(dense, pruned, seen[0].hessian)
    return row


def _check_weights(decoder: Decoder, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"dense_weights: expected what copy_weights gives, received {type(given).__name__}")
    linears = decoder.linears()
    for name, linear in linears.items():
        if name not in given:
            raise ValueError(
                f"dense_weights: expected one for each of {len(linears)} layers, received none for {name}; "
                "copy_weights takes them from the dense model"
            )
        if not isinstance(given[name], Tensor):
            raise TypeError(f"dense_weights: expected tensors, received {type(given[name]).__name__} for {name}")
        if given[name].shape != weight_shape(linear):
            raise ValueError(
                f"dense_weights: expected shape {weight_shape(linear)} for {name}, received {tuple(given[name].shape)}"
            )
