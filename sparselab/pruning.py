"""Prune a model in memory: everything checked first, then the walk through its blocks, then a report."""

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselab import manifest, solvers
from sparselab.allocation import Allocation, Sparsity, parse_allocation
from sparselab.calibration import Collected, enter
from sparselab.errors import NonFiniteError, naming
from sparselab.evaluation import check_replay
from sparselab.methods import Settings, find
from sparselab.models.blocks import Decoder, evaluating, find_linears, parameter_of, read_weight, weight_shape
from sparselab.models.inputs import as_windows, check_tokens
from sparselab.models.zero import has_optimizer, is_partitioned
from sparselab.progress import Progress, tracked
from sparselab.ranks import Ranks, everyone
from sparselab.resources import PeakMemory, Stopwatch
from sparselab.solvers import Pattern
from sparselab.solvers.checks import all_finite
from sparselab.walk import Keeper, Row, Walk, collects, in_order, selected


@dataclass(frozen=True)
class Report:
    """What pruning did, and what it cost.

    Args:
        layers: one row a layer: block, layer, d_out, d_in, sparsity (realised), relative_error (of the layer's outputs
            on its calibration inputs, against the dense weight), optimality_gap (of `Settings.measure_gap`; NaN
            without), tokens, calibrated (False for an expert that too few tokens were routed to: it was pruned as if
            its inputs were uncorrelated and of one size), percdamp (the damping used, a fraction of the mean diagonal;
            NaN where none was needed), retries (how often it was raised for that), seconds (of the solve; layers that
            see the same inputs are solved together, and share the time by their size). Layers that were left as they
            are have no row.
        settings: what was asked for.
        seconds: wall time of the whole walk.
        stages: seconds of it by what they went into: forward passes, statistics, factorise, sweep (the solve, of
            whatever method), error (measuring it); read and write, of a model whose weights lie
            elsewhere; exchange, between processes.
        peak_memory: bytes taken besides the model, on the device of its embedding; see `PeakMemory`.
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

    def save(self, folder: str | Path, calib: Any = None, **about: Any) -> None:
        """Keep the rows as `report.csv` in a new folder, and how they came to be as a manifest, `sparselab.json`.

        Args:
            folder: absent or empty.
            calib: the windows that the model was pruned on, of which the manifest keeps number and hash.
            about: what the report cannot know, by the names of the command's options: with model="tiny",
                dataset="stdlib" and seed=0, say, `sparselab replay` can prune again and compare.

        Raises:
            OutputError: the folder holds something, or cannot be written.
            TypeError: something about it is no name and no number.
        """
        windows = None if calib is None else as_windows(calib)
        manifest.save_report(folder, self.layers, self.settings, windows, about)


def prune(
    model: PreTrainedModel,
    calib: Any = None,
    method: str = "sparsegpt",
    sparsity: Sparsity | Allocation = 0.5,
    percdamp: float = 0.01,
    blocksize: int = 128,
    *,
    propagate: Literal["pruned", "dense"] = "pruned",
    measure_error: bool = True,
    kernel: solvers.Kernel = "auto",
    wbits: int | None = None,
    true_sequential: bool = False,
    retries: int = 0,
    measure_gap: bool = False,
    batch_size: int | None = None,
    progress: Progress = True,
    use_zero: bool = False,
) -> Report:
    """Prune the linear layers of every decoder block in place; embeddings and head are left alone.

    Nothing is changed before all arguments, tokens and weights have been checked. If a layer fails later, the
    blocks before it are already pruned: load the model again.

    Args:
        model: a `transformers` causal language model in float32, float16 or bfloat16, on any device or, by
            `device_map`, on several, in main memory and on disk; or partitioned by DeepSpeed ZeRO-3, see `use_zero`.
        calib: LongTensor [n, seqlen], a list of rows, a DataLoader, or a list of `(input, target)` pairs; or what
            `collect` made of such windows and the dense model, which then serves any number of runs without another
            forward pass (`propagate` is "dense" then). May be None for magnitude, whose layer errors are then not
            known.
        method: a key of `methods.METHODS` ("sparsegpt", "admm", "wanda", "ria", "magnitude"), or one with an update:
            "wanda+cg".
        sparsity: 0.5, "50%", "2:4" or a pattern; or rules for some layers, the others staying as they are:
            "0=dense,1-5:mlp.*=70%,*=50%"; see `allocation.parse_allocation`.
        percdamp, blocksize, propagate, measure_error, kernel, wbits, true_sequential, retries, measure_gap: see
            `Settings`.
        batch_size: windows in one forward pass; None chooses by the device. Memory, not results, depends on it.
        progress: a bar over layers; see `sparselab.progress`.
        use_zero: the model is partitioned by ZeRO-3, and all its processes make this call with the same arguments. One
            block at a time is gathered; windows and layers are shared out among them, and each gets the report.

    Returns:
        A report with one row a layer.

    Raises:
        ValueError: an argument is wrong, the tokens do not fit the model, or its weights cannot be put back where they
            are.
        TypeError: an argument is of the wrong kind.
        OutputError: there is no room on disk for pruned weights of an offloaded model.
        UnsupportedModelError: no decoder blocks are found, or they keep weights outside of linear layers.
        NonFiniteError: weights, inputs or outputs are NaN or infinite; the layer is named.
        SingularHessianError: a damped Hessian is not positive definite; the layer is named.
        LostRankError: another process has ended.
    """
    collected = calib if isinstance(calib, dict) else None
    settings = Settings(
        method,
        parse_allocation(sparsity),
        percdamp,
        blocksize,
        propagate if collected is None else "dense",
        measure_error and calib is not None,
        kernel,
        wbits,
        true_sequential,
        retries,
        measure_gap and calib is not None,
    )
    check_calib(method, calib)
    decoder = Decoder(model)
    decoder.residence.check_write_back(lambda name: not decoder.is_outside(name))
    _check_zero(model, use_zero)
    check_model(decoder, [settings], collected)
    windows = None if calib is None or collected is not None else check_tokens(decoder, calib)
    ranks = everyone() if use_zero else Ranks()
    if windows is not None:
        ranks.check_same("calib", windows.cpu().numpy().tobytes(), decoder.device)
    bar = progress if ranks.leads else False
    return walk_all(decoder, settings, windows, collected or {}, batch_size, bar, ranks=ranks)


def walk_all(
    decoder: Decoder,
    settings: Settings,
    windows: Int[Tensor, "n seqlen"] | None,
    collected: Collected,
    batch_size: int | None = None,
    progress: Progress = True,
    *,
    keeper: Keeper | None = None,
    spill: Path | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Prune block after block of a model that `check_model` has looked at.

    Args:
        decoder, settings: what is pruned, and how.
        windows: calibration tokens of all processes; None if there are none, or statistics in their place.
        collected: those statistics.
        batch_size, progress: see `prune`.
        keeper, ranks: see `Walk`.
        spill: see `enter`.

    Raises:
        NonFiniteError, SingularHessianError: see `prune`.
        UnsupportedModelError: see `check_replay`.
        LostRankError: another process has ended.
    """
    rows: list[Row] = []
    ranks = ranks or Ranks()
    layers = sum(len(selected(decoder, index, settings)) for index in range(len(decoder.blocks)))
    with (
        evaluating(decoder.model),
        PeakMemory(decoder.device) as memory,
        tracked(progress, layers, f"{settings.method} {settings.pattern!s:.24}", "layer") as advance,
    ):
        started, watch = time.perf_counter(), Stopwatch(decoder.device)
        walk = Walk(decoder, settings, watch, [], collected, keeper, ranks)
        finished = keeper is not None and keeper.kept(len(decoder.blocks) - 1) is not None
        if windows is not None and collects(settings) != "nothing" and not finished:
            if ranks.leads or decoder.residence.collective:
                check_replay(decoder, windows[:1])
            with watch.stage("forward"):
                walk.streams = enter(decoder, ranks.part(windows), batch_size, spill)
        for index in range(len(decoder.blocks)):
            for row in walk.prune_block(index):
                rows.append(row)
                advance(1)
        stages, seconds = watch.seconds(), time.perf_counter() - started
    rows = in_order(decoder, rows)
    if starved := [row for row in rows if not row["calibrated"]]:
        first = starved[0]
        warnings.warn(
            f"{len(starved)} of {len(rows)} layers are experts that fewer tokens were routed to than they have inputs, "
            f"first {decoder.block_prefix(first['block'])}{first['layer']} with {first['tokens']} tokens; they were "
            "pruned as if their inputs were uncorrelated and of one size (column `calibrated` of the report): "
            "calibrate on more tokens",
            stacklevel=2,
        )
    return Report(pd.DataFrame(rows), settings, seconds, stages, memory.bytes)


def check_calib(method: str, calib: Any) -> None:
    """Raise ValueError where a method needs calibration windows and there are none."""
    if calib is None and find(method).needs != "nothing":
        raise ValueError(f"calib: {method} needs calibration windows, received None; see calibration_tokens")


def check_model(
    decoder: Decoder,
    runs: Sequence[Settings],
    collected: Collected | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Look at everything that can be known to fail in pruning a model.

    Args:
        decoder: the model; not changed.
        runs: what would be done to it, each time from the weights that it has now, which are read once.
        collected: statistics that would be used, if they are at hand.
        ranks: processes that share this, each looking at some of the blocks.

    Raises:
        ValueError, SparselabError: see `prune`.
    """
    decoder.check_prunable()
    _check_settings(decoder, runs, collected)
    ranks = Ranks() if ranks is None or decoder.residence.collective else ranks
    for index in range(ranks.rank, len(decoder.blocks), ranks.world):
        with decoder.block(index) as block:
            _check_weights(block, decoder.block_prefix(index))
    if decoder.streamed and not decoder.residence.collective:
        if ranks.leads:  # one after the other: together they may be larger than a block
            _check_finite(decoder.streamed.read(decoder.streamed.names(decoder.is_outside)))
    else:
        with decoder.outside():
            _check_finite(param for param in decoder.model.named_parameters() if decoder.is_outside(param[0]))


def _check_zero(model: PreTrainedModel, use_zero: bool) -> None:
    if use_zero and not is_partitioned(model):
        raise ValueError(
            "use_zero: expected a model that DeepSpeed ZeRO-3 has partitioned among processes, received one that this "
            "process has whole; leave use_zero out"
        )
    if is_partitioned(model) and not use_zero:
        raise ValueError(
            "use_zero: expected True for a model that DeepSpeed ZeRO-3 has partitioned among processes, "
            "received False; pass it in all of them"
        )
    if has_optimizer(model):
        raise ValueError(
            "use_zero: expected a model without an optimizer, which holds weights of its own and would bring the dense "
            "ones back; save the model, and prune it outside of training"
        )


def _check_settings(decoder: Decoder, runs: Sequence[Settings], collected: Collected | None) -> None:
    """What shapes and devices alone can tell."""
    linears = decoder.linears()
    if collected is not None and (lacking := [name for name in _pruned(decoder, runs) if name not in collected]):
        raise ValueError(
            f"calib: expected statistics of all {len(_pruned(decoder, runs))} layers that are pruned, "
            f"as collect gives without `blocks`; received none of {lacking[0]}"
        )
    places = {parameter_of(linear).device for linear in linears.values()} - {torch.device("meta")} or {decoder.device}
    for device, settings in product(places, runs):
        if find(settings.method).sweeps:
            solvers.block_sweeper(settings.kernel, settings.blocksize, device, settings.wbits is not None)
    for settings in runs:
        if isinstance(settings.pattern, Allocation):
            settings.pattern.check(decoder.layers())
        for index in range(len(decoder.blocks)):
            for name, linear in selected(decoder, index, settings).items():
                pattern, d_in = cast(Pattern, settings.pattern_at(index, name)), weight_shape(linear)[1]
                with naming(decoder.block_prefix(index) + name):
                    pattern.check(d_in, settings.blocksize if find(settings.method).sweeps else d_in)


def _pruned(decoder: Decoder, runs: Sequence[Settings]) -> list[str]:
    """Full names of the layers that are pruned in any of the runs."""
    layers = [(index, name) for index, name in decoder.layers() if any(run.pattern_at(index, name) for run in runs)]
    return [decoder.block_prefix(index) + name for index, name in layers]


def _check_weights(block: nn.Module, prefix: str) -> None:
    """A block's layers can be pruned, and what else it has would not make a damaged model."""
    linears = find_linears(block)
    for name, linear in linears.items():
        with naming(prefix + name):
            solvers.check_weight(read_weight(linear))
    weights = {f"{name}.weight" for name in linears}
    _check_finite((prefix + name, value) for name, value in block.named_parameters() if name not in weights)


def _check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    for name, parameter in parameters:
        if parameter.is_floating_point() and not all_finite(parameter):
            raise NonFiniteError(f"{name}: expected finite values, received NaN or infinite ones; load the model again")
