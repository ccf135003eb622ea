"""Runs that can be told apart, repeated and kept: what is pruned, how, on which text, and what came of it."""

import hashlib
import json
import math
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import __version__, corpora, files, sources
from sparselab.allocation import parse_allocation
from sparselab.calibration import Collected, collect, collect_nested
from sparselab.errors import SingularHessianError
from sparselab.evaluation import Perplexity, perplexity
from sparselab.manifest import tokens_hash, weights_hash
from sparselab.methods import Settings, find
from sparselab.models.blocks import Decoder, find_linears, read_weight
from sparselab.progress import Progress
from sparselab.pruning import Report, prune
from sparselab.quality import copy_weights, dense_again, layer_quality
from sparselab.solvers import relative_error
from sparselab.uncertainty import Interval, difference

_REFERENCE_WINDOWS = 128
MEASURES = ("perplexity", "errors", "gap")
RESULT, FAILURE = "result.json", "failure.json"
_LAYER, _QUALITY = ["block", "layer"], ["calibration_error", "optimality_gap", "residual"]


@dataclass(frozen=True)
class TextConfig:
    """Which text a model is calibrated and measured on.

    Args:
        dataset: calibration text, see `sources.source`.
        eval_dataset: evaluation text; "stdlib" and the papers' are read on their held-out side.
        seqlen: tokens a window, for both.
        eval_nsamples: evaluation windows.
        bos: "document" or "window", see `corpora.calibration_tokens`.
    """

    dataset: sources.Dataset = "stdlib"
    eval_dataset: sources.Dataset = "stdlib"
    seqlen: int = 256
    eval_nsamples: int = 400
    bos: corpora.Bos = "document"

    def __post_init__(self) -> None:
        for name, least in (("seqlen", 2), ("eval_nsamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, received {getattr(self, name)}")
        sources.check_apart(self.dataset, self.eval_dataset)
        corpora.check_bos(self.bos)


def check_measure(measure: str) -> str:
    """What is to be measured, in the order of `MEASURES`.

    Raises:
        ValueError: it is none of these, joined by "+".
    """
    wanted = measure.split("+")
    if not set(wanted) <= set(MEASURES):
        raise ValueError(f"measure: expected some of {', '.join(MEASURES)}, joined by +, received {measure!r}")
    return "+".join(each for each in MEASURES if each in wanted)


def check_several(config: object, *names: str) -> None:
    """Raise TypeError or ValueError unless each of these settings is a tuple of one or more."""
    for name in names:
        if isinstance(value := getattr(config, name), str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected several in a tuple, received {value!r}")
    if not all(getattr(config, name) for name in names):
        raise ValueError(f"{', '.join(names)}: expected at least one of each, received none")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the pruned weights, given a model and a text.

    Args:
        method: a key of `sparselab.methods.METHODS`.
        sparsity: 0.5, "50%", "2:4" or rules for some layers; kept as it is written in tables.
        percdamp, blocksize, propagate, wbits, true_sequential: see `sparselab.methods.Settings`.
        nsamples: calibration windows.
        seed: of the calibration draw.
    """

    method: str = "sparsegpt"
    sparsity: str | float = "50%"
    percdamp: float = 0.01
    blocksize: int = 128
    nsamples: int = 128
    seed: int = 0
    propagate: Literal["pruned", "dense"] = "pruned"
    wbits: int | None = None
    true_sequential: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", str(self.settings.pattern))
        for name, least in (("nsamples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, received {getattr(self, name)}")

    @property
    def settings(self) -> Settings:
        """What is done to each layer."""
        return Settings(
            self.method,
            parse_allocation(self.sparsity),
            self.percdamp,
            self.blocksize,
            self.propagate,
            wbits=self.wbits,
            true_sequential=self.true_sequential,
        )

    def replicates(self, seeds: Sequence[int]) -> "list[RunConfig]":
        """The same for each calibration draw; of a method that reads no text one run, which stands for all of them."""
        needs = find(self.method).needs
        return [replace(self, seed=seeds[0] if needs == "nothing" else seed) for seed in seeds]


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Args:
        row: method, pattern, percdamp, blocksize, nsamples, seed, propagate; sparsity (realised), perplexity, stderr,
            ratio (to dense), relative_error and calibration_error (means over layers), optimality_gap (geometric mean
            over layers), seconds and peak_memory_mb (of calibration and solve, besides the model); failure, "" unless
            a Hessian could not be factored, or an error ended it, and then nothing is measured. NaN is what was not to
            be measured.
        layers: a row a layer: method, pattern, seed, block, layer, sparsity, relative_error, calibration_error,
            optimality_gap, residual; see `Workbench`.
        nll: loss of each held-out window, see `Perplexity`; none after a failure, or if it was not measured.
    """

    row: dict[str, Any]
    layers: list[dict[str, Any]]
    nll: list[float] = field(default_factory=list)


class Workbench:
    """A model and its text at hand: dense weights kept, the dense perplexity measured once, no run computed twice.

    A run's relative errors are those of its weights on the dense model's inputs on held-out windows, so that runs of
    any method, seed and number of calibration windows are measured alike, and none on what it was fitted to. What else
    there is about layers is what `layer_quality` finds on the run's own calibration windows.

    Args:
        model: a causal language model; it is dense again after every run.
        tokenizer: its tokenizer.
        name: what to call the model in tables.
        text: what it is calibrated and measured on.
        folder: where finished runs, and the dense model's perplexity, are kept and found again; None keeps them in
            memory alone.
        measure: what is measured after a run, besides its seconds and memory; some of these, joined by "+":
            "perplexity" on the held-out windows; relative "errors" of layers, for which the statistics of all layers
            are held in memory; and the "gap" to the best weights for the same masks, with the error on calibration
            windows, which takes another pass of these and often longer than the run.

    Raises:
        ValueError: the model is not whole in memory, a text is too short, or there is nothing of that name to measure.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        text: TextConfig | None = None,
        folder: Path | None = None,
        measure: str = "+".join(MEASURES),
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.text, self.folder, self.measure = text or TextConfig(), folder, check_measure(measure)
        self.held_out = corpora.evaluation_tokens(
            tokenizer, self.text.eval_dataset, self.text.eval_nsamples, self.text.seqlen, self.text.bos
        )
        self._decoder = Decoder(model)
        self._decoder.check_whole()
        self._dense_weights = copy_weights(model)
        self._results: dict[RunConfig, Result] = {}
        self._collected: dict[tuple[int, int], Collected] = {}

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a result depends on besides settings: name and hash of the model, hashes of texts, measures, version."""
        return {
            "model": self.name,
            "weights": weights_hash(self.model),
            "calibration_text": self._text.sha256,
            "evaluation_tokens": tokens_hash(self.held_out),
            "measure": self.measure,
            "version": __version__,
        }

    @cached_property
    def dense(self) -> Perplexity:
        """Perplexity of the dense model on the held-out windows."""
        if self.folder is None:
            return perplexity(self.model, self.held_out, progress=False)
        about = {name: value for name, value in self.identity.items() if name not in ("calibration_text", "measure")}
        path = self.folder / "dense" / f"{_key(about)}.json"
        if path.is_file():
            return self._measured(json.loads(path.read_text(encoding="utf-8"))["nll"])
        found = perplexity(self.model, self.held_out, progress=False)
        _write(path, about | {"nll": found.nll.tolist()})
        return found

    @cached_property
    def reference(self) -> Collected:
        """Statistics of every layer's inputs in the dense model on held-out windows, to measure layer errors on."""
        return collect(self.model, self.held_out[:_REFERENCE_WINDOWS], progress=False)

    @property
    def runs(self) -> pd.DataFrame:
        """A row a finished run, in the order they were asked for; see `Result`."""
        return pd.DataFrame([result.row for result in self._results.values()])

    def calibration(self, nsamples: int, seed: int) -> Int[Tensor, "nsamples seqlen"]:
        """The calibration windows of a run; those of fewer windows are the first of more."""
        return self._text.draw(nsamples, seed)

    @cached_property
    def _text(self) -> corpora.CalibrationText:
        return corpora.CalibrationText(self.tokenizer, self.text.dataset, self.text.seqlen, self.text.bos)

    def collect(self, sizes: Sequence[int], seed: int, progress: Progress = False) -> None:
        """Collect the dense model's statistics for several numbers of windows in one pass, for `propagate="dense"`."""
        nested = collect_nested(self.model, self.calibration(max(sizes), seed), sizes, progress=progress)
        self._collected.update({(size, seed): statistics for size, statistics in nested.items()})

    def forget_collected(self) -> None:
        """Give the memory back that `collect` took."""
        self._collected = {}

    def finished(self, config: RunConfig) -> Result | None:
        """The result of a run, if it was computed before: by this object, or by another on the same folder."""
        if config not in self._results and self.folder is not None and self._path(self.folder, config).is_file():
            kept = json.loads(self._path(self.folder, config).read_text(encoding="utf-8"))
            self._results[config] = Result(kept["row"], kept["layers"], kept["nll"])
        return self._results.get(config)

    def run(self, config: RunConfig, progress: Progress = False) -> Result:
        """Prune, measure, and put the dense weights back; or give what is known of this run already.

        Args:
            config: what to do.
            progress: told of every layer pruned and every window evaluated; what it raises stops the run, of which
                then nothing is kept.

        Raises:
            ValueError, SparselabError: see `prune` and `perplexity`. A Hessian that cannot be factored does not
            raise: it is a result, with the reason in `failure`.
        """
        if (known := self.finished(config)) is not None:
            return known
        try:
            with dense_again(self.model, self._dense_weights):
                result = self._compute(config, progress)
        except SingularHessianError as error:
            result = Result(_described(config) | {"failure": str(error)}, [])
        if self.folder is not None:
            _write(self._path(self.folder, config), self.identity | {"text": asdict(self.text)} | asdict(result))
        self._results[config] = result
        return result

    def run_all(self, configs: Sequence[RunConfig], progress: bool = True) -> pd.DataFrame:
        """Several runs one after another, as a table; an interruption loses the one under way and no other."""
        results = []
        for config in (bar := tqdm(configs, unit="run", disable=not progress)):
            bar.set_description(f"{config.method} {config.sparsity}")
            results.append(self.run(config).row)
        return pd.DataFrame(results)

    def perplexity(self, config: RunConfig, progress: Progress = False) -> Perplexity:
        """The perplexity after a run, on the held-out windows.

        Raises:
            ValueError: it is not measured here.
            SingularHessianError: the run failed.
        """
        if "perplexity" not in self.measure:
            raise ValueError(f"perplexity: expected a workbench that measures it, received one of {self.measure!r}")
        result = self.run(config, progress)
        if result.row["failure"]:
            raise SingularHessianError(result.row["failure"])
        return self._measured(result.nll)

    def difference(
        self, first: RunConfig, second: RunConfig, seeds: Sequence[int] = (0,), progress: Progress = False
    ) -> Interval:
        """Log perplexity of the first run minus that of the second, paired by seed and window; see `difference`.

        Args:
            first, second: what is compared; their own seeds are not looked at.
            seeds: calibration draws; runs that are not done yet are done.
            progress: see `run`.

        Raises:
            ValueError: no seeds, or perplexity is not measured.
            SingularHessianError: a run failed.
        """
        if not seeds:
            raise ValueError("seeds: expected at least one, received none")
        pair = [[self.perplexity(run, progress) for run in config.replicates(seeds)] for config in (first, second)]
        return difference(*pair)

    def _compute(self, config: RunConfig, progress: Progress) -> Result:
        dense = self.dense if "perplexity" in self.measure else None  # of the model as it is now, which is dense
        reference = self.reference if "errors" in self.measure else {}
        calib: Any = self._collected.get((config.nsamples, config.seed)) if config.propagate == "dense" else None
        if calib is None:
            calib = self.calibration(config.nsamples, config.seed)
        report = prune(
            self.model, calib, config.method, config.sparsity, config.percdamp, config.blocksize,
            propagate=config.propagate, measure_error=False, wbits=config.wbits,
            true_sequential=config.true_sequential, progress=progress,
        )  # fmt: skip
        ppl = perplexity(self.model, self.held_out, progress=progress) if dense is not None else None
        layers = report.layers[["block", "layer", "sparsity"]]
        layers = layers.merge(self._errors(reference), "left", _LAYER)
        if "gap" in self.measure:
            calib = self.calibration(config.nsamples, config.seed)
            found = layer_quality(self.model, self._dense_weights, calib, progress=progress)
            layers = layers.merge(found[[*_LAYER, *_QUALITY]], "left", _LAYER)
        layers = layers.reindex(columns=list(dict.fromkeys([*layers, *_QUALITY])))
        about = {"method": config.method, "pattern": config.sparsity, "seed": config.seed}
        rows: Any = layers.assign(**about).to_dict("records")
        return Result(_row(config, report, ppl, dense, layers), rows, [] if ppl is None else ppl.nll.tolist())

    def _errors(self, reference: Collected) -> pd.DataFrame:
        """Relative errors of all layers of the model as it is now, on the dense model's inputs."""
        rows = []
        for index, block in enumerate(self._decoder.blocks):
            for layer, linear in find_linears(block).items():
                name = f"{self._decoder.block_prefix(index)}{layer}"
                dense, pruned = self._dense_weights[name], read_weight(linear)
                error = relative_error(dense, pruned, reference[name].hessian) if reference else float("nan")
                rows.append({"block": index, "layer": layer, "relative_error": error})
        return pd.DataFrame(rows)

    def _measured(self, nll: list[float]) -> Perplexity:
        return Perplexity(torch.tensor(nll, dtype=torch.float64), self.held_out.shape[1])

    def _path(self, folder: Path, config: RunConfig) -> Path:
        return run_folder(folder, self.identity, self.text, config) / RESULT


def run_folder(folder: Path, identity: dict[str, str], text: TextConfig, config: RunConfig) -> Path:
    """Where a run is kept: named by a hash of all that its result depends on.

    Args:
        folder: of all runs.
        identity: of the workbench.
        text, config: settings.
    """
    return folder / _key(identity | asdict(text) | _described(config))


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _write(path: Path, kept: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(kept, indent=1, default=str) + "\n")


def keep_failure(
    folder: Path, identity: dict[str, str], text: TextConfig, config: RunConfig, error: BaseException
) -> None:
    """Write down why a run has no result, in the form of one.

    Args:
        folder: from `run_folder`.
        identity: of the workbench.
        text, config: settings.
        error: what was raised.
    """
    why = " ".join(f"{type(error).__name__}: {error}".split())
    about = identity | {"text": asdict(text), "traceback": traceback.format_exception(error)}
    _write(folder / FAILURE, about | asdict(Result(_described(config) | {"failure": why}, [])))


def _described(config: RunConfig) -> dict[str, Any]:
    described = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    return {"method": described.pop("method"), "pattern": described.pop("sparsity")} | described


def _row(
    config: RunConfig, report: Report, ppl: Perplexity | None, dense: Perplexity | None, layers: pd.DataFrame
) -> dict[str, Any]:
    quality = dict.fromkeys(("perplexity", "stderr", "ratio"), math.nan)
    if ppl is not None and dense is not None:
        quality = {"perplexity": float(ppl), "stderr": ppl.stderr, "ratio": float(ppl) / float(dense)}
    return _described(config) | {
        "sparsity": report.sparsity,
        **quality,
        "relative_error": float(layers.relative_error.mean()),
        "calibration_error": float(layers.calibration_error.mean()),
        "optimality_gap": float(np.exp(np.log(layers.optimality_gap).mean())),
        "seconds": report.seconds,
        "peak_memory_mb": report.peak_memory / 1e6,
        "failure": "",
    }
