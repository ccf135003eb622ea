"""The main job: one model pruned several ways on the same windows, and what each way cost."""

import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import estimates, files, manifest, sources
from sparselab.errors import SingularHessianError
from sparselab.experiment import RunConfig, TextConfig, Workbench, check_several
from sparselab.models.blocks import Decoder
from sparselab.models.inputs import check_tokens
from sparselab.pruning import check_model
from sparselab.uncertainty import Interval, difference, pooled

_MEANS = ["sparsity", "relative_error", "optimality_gap", "seconds", "peak_memory_mb"]  # over seeds
_COLUMNS = ["method", "pattern", "sparsity", "perplexity", "stderr", "ratio", *_MEANS[1:]]
# Not for a manifest: the first two follow from the perplexities, and relative to themselves say nothing when they are
# small; the last is known to 1%.
_DERIVED = ["difference", "difference_half_width", "optimality_gap"]


@dataclass(frozen=True)
class CompareConfig(TextConfig):
    """What is compared, and on which text.

    Args:
        dataset, eval_dataset, seqlen, eval_nsamples, bos: see `TextConfig`.
        methods: keys of `sparselab.methods.METHODS`.
        sparsities: fractions, percentages or N:M.
        percdamp, blocksize: of SparseGPT.
        nsamples: calibration windows.
        seeds: of the calibration draws; results are means over them.
    """

    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    sparsities: tuple[str, ...] = ("50%", "60%", "70%", "2:4")
    percdamp: float = 0.01
    blocksize: int = 128
    nsamples: int = 128
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_several(self, "methods", "sparsities", "seeds")
        self.runs()  # each of which checks itself
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different ones, received {', '.join(map(str, self.seeds))}")

    @property
    def baseline(self) -> str:
        """The method that the others are compared with: SparseGPT, or the first where that is not among them."""
        return "sparsegpt" if "sparsegpt" in self.methods else self.methods[0]

    def rows(self) -> list[list[RunConfig]]:
        """Every method at every sparsity: one run for each seed, see `RunConfig.replicates`."""
        return [
            RunConfig(method, sparsity, self.percdamp, self.blocksize, self.nsamples).replicates(self.seeds)
            for sparsity in self.sparsities
            for method in self.methods
        ]

    def runs(self) -> list[RunConfig]:
        """Every run that it takes."""
        return list(dict.fromkeys(run for row in self.rows() for run in row))


@dataclass
class Comparison:
    """Results so far, and what they are results of.

    Args:
        config: what was asked for.
        model: name of the model.
        runs: one row a method and pattern, the dense model first: method, pattern, sparsity (realised), perplexity (exp
            of the mean loss over windows and seeds), stderr (over windows; over seeds too if there are several), ratio
            (to dense), difference and difference_half_width (log perplexity minus that of the baseline at the same
            pattern, with its 95% interval, see `uncertainty.difference`; NaN of the baseline itself), relative_error
            and optimality_gap (over layers, see `Result`), seconds and peak_memory_mb (of calibration and solve,
            besides the loaded model); these five and the sparsity are means over seeds.
        layers: one row a layer of each run: method, pattern, seed, block, layer, sparsity, relative_error,
            calibration_error, optimality_gap, residual.
        made: what is known of how they were made; None if they were not made here.
    """

    config: CompareConfig
    model: str
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    made: manifest.Manifest | None = None

    @property
    def about(self) -> str:
        """What every figure has to state."""
        return caption(self.model, self.config, self.config.nsamples, self.config.seeds)

    @property
    def about_perplexity(self) -> str:
        """What a figure of perplexities has to state."""
        over = "windows" if len(self.config.seeds) == 1 else "windows and seeds"
        return f"{self.about}; perplexity ± standard error over {over}"

    @property
    def caption(self) -> str:
        """What the table has to state."""
        about, baseline = self.about_perplexity, self.config.baseline
        if set(self.config.methods) == {baseline}:
            return about
        return f"{about}; difference: log perplexity minus {baseline}'s, ± half of its 95% interval"

    @property
    def table(self) -> pd.DataFrame:
        """The runs as text to print: numbers rounded, nothing where nothing was measured."""
        return as_text(self.runs)

    def save(self, folder: Path) -> None:
        """Write `runs.csv`, `layers.csv`, the table as `runs.md`, and the manifest."""
        files.write_text(folder / "runs.csv", self.runs.to_csv(index=False))
        files.write_text(folder / "runs.md", files.markdown_table(self.table))
        files.write_text(folder / "layers.csv", self.layers.to_csv(index=False))
        made = self.made or manifest.begin("compare", _settings(self.config, self.model), {}, manifest.machine_record())
        results = {"runs": self.runs.drop(columns=_DERIVED, errors="ignore"), "finished": self._finished}
        manifest.finish(folder, made, results, ["runs.csv", "layers.csv"])

    @property
    def _finished(self) -> bool:
        done = 0 if self.layers.empty else len(self.layers.drop_duplicates(["method", "pattern", "seed"]))
        return done == len(set(self.config.runs()))


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CompareConfig | None = None,
    name: str = "model",
    out: Path | None = None,
    progress: bool = True,
    request: manifest.Request | None = None,
) -> Comparison:
    """Prune one model by every method at every sparsity, on the same windows, and evaluate each on the same text.

    The model is put back to its dense weights after every run. Seconds and memory are those of a run that does only
    what its method needs.

    Args:
        model: a causal language model; unchanged in the end.
        tokenizer: its tokenizer.
        config: see `CompareConfig`.
        name: what to call the model.
        out: existing folder to write to after every run.
        progress: show a bar.
        request: who asked for it, for the manifest.

    Raises:
        ValueError, SparselabError: see `prune` and `perplexity`. What is finished by then has been written to `out`.
    """
    config = config or CompareConfig()
    if out is not None and not out.is_dir():
        raise ValueError(f"out: expected an existing folder, received {out}")
    bench, runs = _checked_bench(model, tokenizer, name, config), config.runs()
    result = Comparison(config, name, made=_begun(bench, config, request))
    with tqdm(total=len(runs) + 1, desc="dense", unit="run", disable=not progress) as bar:
        result.runs = _table(bench, config)
        bar.update()
        for run in runs:
            bar.set_description(f"{run.method} {run.sparsity}")
            done = bench.run(run)
            if done.row["failure"]:
                raise SingularHessianError(done.row["failure"])
            result.runs = _table(bench, config)
            result.layers = pd.concat([result.layers, pd.DataFrame(done.layers)], ignore_index=True)
            if out is not None:
                result.save(out)
            bar.update()
    return result


def _checked_bench(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, config: CompareConfig
) -> Workbench:
    """Model and text at hand, once all is known to be well that can be known before the first run."""
    decoder = Decoder(model)
    check_model(decoder, [run.settings for run in config.runs()])
    bench = Workbench(model, tokenizer, name, config)
    check_tokens(decoder, bench.calibration(config.nsamples, config.seeds[0]))
    return bench


def _begun(bench: Workbench, config: CompareConfig, request: manifest.Request | None) -> manifest.Manifest:
    """The manifest, but for the results."""
    model, seeds = bench.model, sorted({run.seed for run in config.runs()})
    inputs = {"model": manifest.model_record(bench.name, model.config, manifest.weights_hash(model))}
    for seed in seeds:
        windows = bench.calibration(config.nsamples, seed)
        inputs["calibration" if len(seeds) == 1 else f"calibration, seed {seed}"] = manifest.windows_record(
            windows, bench.tokenizer, config.dataset
        )
    inputs["evaluation"] = manifest.windows_record(bench.held_out, bench.tokenizer, config.eval_dataset)
    settings = {"device": model.device.type, "dtype": model.dtype} | _settings(config, bench.name)
    return manifest.begin("compare", settings, inputs, manifest.machine_record(model.device, model.dtype), request)


def _settings(config: CompareConfig, name: str) -> dict[str, Any]:
    """By the names of the command's options; texts that were given have none."""
    given = {"model": name} | asdict(config)
    given |= {"sparsity": given.pop("sparsities"), "seed": given.pop("seeds")}
    datasets = {each: given[each] for each in ("dataset", "eval_dataset")}
    return given | {each: value if isinstance(value, str | Path) else None for each, value in datasets.items()}


def dense_row(bench: Workbench) -> pd.DataFrame:
    """The dense model as the first row of a table of runs."""
    row = {"method": "dense", "pattern": "", "sparsity": 0.0, "ratio": 1.0}
    row |= {"perplexity": float(bench.dense), "stderr": bench.dense.stderr}
    return pd.DataFrame([row], columns=_COLUMNS)


def _table(bench: Workbench, config: CompareConfig) -> pd.DataFrame:
    """The rows of which all runs are finished; differences as soon as those of the baseline are."""
    groups = [group for group in config.rows() if all(bench.finished(run) for run in group)]
    baselines = {group[0].sparsity: group for group in groups if group[0].method == config.baseline}
    rows = dense_row(bench).to_dict("records")
    rows += [_row(bench, group, baselines.get(group[0].sparsity)) for group in groups]
    first = _COLUMNS.index("ratio") + 1
    return pd.DataFrame(rows, columns=[*_COLUMNS[:first], "difference", "difference_half_width", *_COLUMNS[first:]])


def _row(bench: Workbench, group: list[RunConfig], baseline: list[RunConfig] | None) -> dict[Hashable, Any]:
    """Replicates of one run as one row, beside those of the baseline."""
    measured = [bench.perplexity(run) for run in group]
    value, stderr = pooled(measured)
    row: dict[Hashable, Any] = {"method": group[0].method, "pattern": group[0].sparsity}
    row |= {"perplexity": value, "stderr": stderr, "ratio": value / float(bench.dense)}
    row |= pd.DataFrame([bench.run(run).row for run in group])[_MEANS].mean().to_dict()
    if baseline is None or baseline == group:
        return row
    found = difference(measured, [bench.perplexity(run) for run in baseline])
    return row | {"difference": found.mean, "difference_half_width": found.half_width}


def as_text(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs as text to print: numbers rounded, those with an error beside it, nothing where nothing was measured.

    Args:
        runs: of a `Comparison`, or the columns of `dense_row` of a bench's runs.
    """
    formats = {"sparsity": "{:.2%}", "ratio": "{:.3f}", "relative_error": "{:.4f}", "optimality_gap": "{:.2f}"}
    formats |= {"seconds": "{:.2f}", "peak_memory_mb": "{:.0f}"}
    shown: dict[str, Any] = {name: runs[name].map(form.format) for name, form in formats.items()}
    shown["perplexity"] = runs.perplexity.map("{:.2f} ± ".format) + runs.stderr.map("{:.2f}".format)
    if "difference" in runs:
        pairs = zip(runs.difference, runs.difference_half_width, strict=True)
        shown["difference"] = ["" if math.isnan(mean) else Interval(mean, half).in_words for mean, half in pairs]
    text = runs.assign(**shown).drop(columns=["stderr", "difference_half_width"], errors="ignore")
    return text.replace(["nan", "nan%", "nan ± nan"], "").rename(columns={"optimality_gap": "gap"})


def caption(model: str, text: TextConfig, nsamples: int | str, seeds: tuple[int, ...]) -> str:
    """What every figure and table has to state: model, tokens and seeds."""
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    calibrated = f"{nsamples} × {text.seqlen} tokens of {sources.describe(text.dataset)} ({which})"
    evaluated = f"{text.eval_nsamples} × {text.seqlen} tokens of {sources.describe(text.eval_dataset)}"
    begun = "" if text.bos == "document" else "; each window begins with the begin-of-sequence token"
    return f"{model}; calibrated on {calibrated}, evaluated on {evaluated}{begun}"


def estimate_seconds(model: PreTrainedModel, config: CompareConfig) -> float:
    """About how long `compare` will take, from the speed of a few batches of the model's own blocks."""
    windows = estimates.windows_before(config.eval_nsamples, config.nsamples)
    windows += estimates.windows_passed(config.runs(), config.eval_nsamples)
    return windows * estimates.seconds_per_window(model, config.seqlen)
