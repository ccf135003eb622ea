"""The block walk: calibrate a block, solve its layers, store the result, send the hidden states on."""

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from sparselab import solvers
from sparselab.calibration import Collected, Stream, advance_streams, observe
from sparselab.errors import SingularHessianError, SparselabError, naming
from sparselab.methods import Settings, find
from sparselab.models.blocks import (
    Decoder,
    Linear,
    find_linears,
    parameter_of,
    read_weight,
    weight_shape,
    write_weight,
)
from sparselab.models.experts import Expert
from sparselab.ranks import Ranks
from sparselab.resources import Stopwatch
from sparselab.solvers import InputStatistics, Pattern

Row = dict[str, Any]  # of a report: what became of one layer
_MEASURED = ("sparsity", "relative_error", "optimality_gap", "tokens", "calibrated", "percdamp", "retries", "seconds")
_LEAST_RETRIED = 1e-4  # percdamp that is tried after 0


@runtime_checkable
class Keeper(Protocol):
    """Who is told of each pruned block, and asked for blocks that were pruned before."""

    def kept(self, index: int) -> list[Row] | None:
        """The report's rows of a block that is done already; None if it is not."""

    def restore(self, index: int, block: nn.Module) -> None:
        """Put the pruned weights of a block that is done in place of its dense ones."""

    def keep(self, index: int, rows: list[Row]) -> None:
        """Take note of a block that has been pruned, while its weights are there."""


@dataclass
class Walk:
    """One walk through the blocks of a model.

    Args:
        decoder: the model.
        settings: what is done to each layer.
        watch: told where time goes.
        streams: what enters the first block; moves on with the walk. Empty if no tokens are needed.
        collected: statistics to use where there are no streams.
        keeper: where pruned weights go; None leaves them in the model.
        ranks: who takes part; each with streams of its own, all with the same blocks.
    """

    decoder: Decoder
    settings: Settings
    watch: Stopwatch
    streams: list[Stream] = field(default_factory=list)
    collected: Collected = field(default_factory=dict)
    keeper: Keeper | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def prune_block(self, index: int) -> Iterator[Row]:
        """Prune a block, or take it as it was pruned before; hidden states have moved on when the last row has come."""
        done = self.keeper.kept(index) if self.keeper else None
        if done is not None and not self.streams:
            yield from done
            return
        dense, last = self.settings.propagate == "dense", index + 1 == len(self.decoder.blocks)
        foresee = dense and not last and bool(selected(self.decoder, index, self.settings))
        with ExitStack() as stack:
            with nullcontext() if self.decoder.residence.whole else self.watch.stage("read"):
                block = stack.enter_context(self.decoder.block(index, write_back=self.keeper is None))
            if done is None:
                rows = []
                for row in self._prune_layers(index, foresee):
                    rows.append(row)
                    yield row
                if self.keeper:
                    with self.watch.stage("write"):
                        self.keeper.keep(index, in_order(self.decoder, rows))
            else:
                yield from done
                if self.keeper and not dense:
                    self.keeper.restore(index, block)
            if not last:
                with self.watch.stage("forward"):
                    advance_streams(self.decoder, index, self.streams, foresee and done is None)
            if not self.decoder.residence.whole:
                with self.watch.stage("write"):  # where the block is to be written back
                    stack.close()

    def _prune_layers(self, index: int, foresee: bool) -> Iterator[Row]:
        linears = selected(self.decoder, index, self.settings)
        for stage in self._stages(index, linears) if linears else ():
            yield from self._prune_stage(index, stage, foresee)

    def _stages(self, index: int, linears: dict[str, Linear]) -> list[dict[str, Linear]]:
        """All layers at once; or, one after another as the block calls them, those that see the same inputs."""
        if not self.settings.true_sequential or not self.streams:
            return [linears]
        with self.watch.stage("forward"):
            called = observe(self.decoder, index, self.streams[:1], False, False, self.watch, linears)
        stages: dict[int, dict[str, Linear]] = {}
        for names in sharing(index, {name: linears[name] for name in called}, called, self.settings):
            first = linears[names[0]]  # all experts of a stack are one stage
            key = id(parameter_of(first)) if isinstance(first, Expert) else id(called[names[0]])
            stages.setdefault(key, {}).update((name, linears[name]) for name in names)
        return list(stages.values())

    def _prune_stage(self, index: int, linears: dict[str, Linear], foresee: bool) -> Iterator[Row]:
        """Each process solves its share of the layers; then all have all."""
        observed = self._observe(index, linears, foresee)
        groups = sharing(index, linears, observed, self.settings)
        owners = self.ranks.owners([_cost([linears[name] for name in names]) for names in groups])
        owned = {name: owner for names, owner in zip(groups, owners, strict=True) for name in names}
        done: dict[str, Row] = {}
        for names in (names for names in groups if owned[names[0]] == self.ranks.rank):
            for row in self._solve(index, {name: linears[name] for name in names}, observed.get(names[0])):
                done[row["layer"]] = row
                yield row
            if self.streams:  # nobody needs the statistics again
                for name in names:
                    del observed[name]
        for name, linear in linears.items() if self.ranks.world > 1 else ():
            with self.watch.stage("exchange"):
                row = self._exchange(linear, done.get(name), owned[name])
            if name not in done:
                yield {"block": index, "layer": name} | row

    def _observe(self, index: int, linears: dict[str, Linear], foresee: bool) -> Collected:
        """Statistics of what enters each layer of a block, by its name there: of all processes' tokens."""
        if not self.streams:
            prefix = self.decoder.block_prefix(index)
            return {name: self.collected[prefix + name] for name in linears if prefix + name in self.collected}
        with self.watch.stage("forward"):
            hessian = collects(self.settings) == "hessian"
            observed = observe(self.decoder, index, self.streams, hessian, foresee, self.watch, linears)
        with self.watch.stage("exchange") if self.ranks.world > 1 else nullcontext():
            for seen in {id(observed[name]): observed[name] for name in linears}.values():  # in one order for all
                seen.total(self.ranks.add_up)
        return observed

    def _solve(self, index: int, linears: dict[str, Linear], seen: InputStatistics | None) -> Iterator[Row]:
        """Solve layers that see the same inputs, and are pruned alike, together; store one after the other."""
        started = time.perf_counter()
        weights = {name: read_weight(linear) for name, linear in linears.items()}
        seen = seen or InputStatistics(next(iter(weights.values())).shape[1], with_hessian=False)  # asked for nothing
        calibrated = not any(isinstance(linear, Expert) for linear in linears.values()) or self._enough(seen)
        results, percdamp, retries = self._results(index, weights, seen if calibrated else seen.knowing_nothing())
        size, taken = sum(weight.numel() for weight in weights.values()), time.perf_counter() - started
        for (name, weight), pruned in zip(weights.items(), results, strict=True):
            d_out, d_in = weight.shape
            with self.watch.stage("error"), naming(self.decoder.block_prefix(index) + name):
                error, gap = self._errors(weight, pruned, seen)
            write_weight(linears[name], pruned)
            yield {
                "block": index,
                "layer": name,
                "d_out": d_out,
                "d_in": d_in,
                "sparsity": solvers.realised_sparsity(pruned),
                "relative_error": error,
                "optimality_gap": gap,
                "tokens": seen.tokens,
                "calibrated": calibrated,
                "percdamp": percdamp,
                "retries": retries,
                "seconds": taken * weight.numel() / size,
            }

    def _enough(self, seen: InputStatistics) -> bool:
        """Whether an expert has seen as many tokens as it has inputs: fewer are worth less than none."""
        return find(self.settings.method).needs == "nothing" or seen.tokens >= len(seen.feature_norm)

    def _results(
        self, index: int, weights: dict[str, Tensor], seen: InputStatistics
    ) -> tuple[list[Tensor], float, int]:
        """New weights of layers that see the same inputs; the percdamp they took, NaN if none, and how often raised."""
        method, to, retries = find(self.settings.method), self.settings, 0
        pattern = cast(Pattern, to.pattern_at(index, next(iter(weights))))
        while True:
            results: list[Tensor] = []
            try:
                if method.sweeps:
                    with self.watch.stage("factorise"):
                        seen.factor(to.percdamp)
                with self.watch.stage("sweep"):
                    for pruned in method.solve(list(weights.values()), seen, pattern, to):
                        results.append(pruned)  # noqa: PERF402 - how many have come tells which of them failed
                return results, to.percdamp if method.needs == "hessian" else float("nan"), retries
            except SparselabError as error:
                message = f"{self.decoder.block_prefix(index)}{list(weights)[len(results)]}: {error}"
                if not isinstance(error, SingularHessianError) or retries == to.retries:
                    raise type(error)(message) from error
                retries, to = retries + 1, replace(to, percdamp=10 * to.percdamp or _LEAST_RETRIED)
                warnings.warn(f"{message}; trying again with percdamp {to.percdamp:g}", stacklevel=2)

    def _errors(self, weight: Tensor, pruned: Tensor, seen: InputStatistics) -> tuple[float, float]:
        """Relative error and optimality gap, NaN where they are not known or not asked for."""
        if not seen.tokens or collects(self.settings) != "hessian":
            return float("nan"), float("nan")
        gap = solvers.optimality_gap(weight, pruned, seen.hessian).gap if self.settings.measure_gap else float("nan")
        return solvers.relative_error(weight, pruned, seen.hessian), gap

    def _exchange(self, linear: Linear, row: Row | None, owner: int) -> Row:
        """Everyone gets the owner's weight and what it measured."""
        weight = read_weight(linear).clone(memory_format=torch.contiguous_format)
        self.ranks.broadcast(weight, owner)
        write_weight(linear, weight)
        measured = torch.tensor([row[name] if row else 0.0 for name in _MEASURED], dtype=torch.float64)
        measured = measured.to(weight.device)
        self.ranks.broadcast(measured, owner)
        d_out, d_in = weight.shape
        found = dict(zip(_MEASURED, measured.tolist(), strict=True))
        exact = {
            "tokens": int(found["tokens"]),
            "retries": int(found["retries"]),
            "calibrated": bool(found["calibrated"]),
        }
        return {"d_out": d_out, "d_in": d_in} | found | exact


def in_order(decoder: Decoder, rows: list[Row]) -> list[Row]:
    """As the layers stand in the model, whichever was solved first."""
    places = {name: place for place, name in enumerate(decoder.linears())}
    return sorted(rows, key=lambda row: places[decoder.block_prefix(row["block"]) + row["layer"]])


def selected(decoder: Decoder, index: int, settings: Settings) -> dict[str, Linear]:
    """The layers of a block that are pruned, by their names there."""
    linears = find_linears(decoder.blocks[index])
    return {name: linear for name, linear in linears.items() if settings.pattern_at(index, name) is not None}


def sharing(index: int, linears: dict[str, Linear], observed: Collected, settings: Settings) -> list[list[str]]:
    """Names of layers that are solved together: with the same inputs, kept alike, and pruned alike; others alone."""
    groups: dict[Any, list[str]] = {}
    for name, linear in linears.items():
        key: Any = name
        if name in observed:
            pattern = settings.pattern_at(index, name)
            key = (id(observed[name]), parameter_of(linear).dtype, parameter_of(linear).device, pattern)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def collects(settings: Settings) -> str:
    """What statistics a run collects: "nothing", "feature norms" or "hessian"."""
    return "hessian" if settings.measure_error else find(settings.method).needs


def _cost(linears: list[Linear]) -> float:
    """Of solving layers that see the same inputs; what other methods do grows alike."""
    shapes = [weight_shape(linear) for linear in linears]
    return solvers.least_flop(sum(d_out for d_out, _ in shapes), shapes[0][1])
