"""The main job: one model pruned several ways on the same windows, and what each way cost."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import corpora, files
from sparselab.errors import SingularHessianError
from sparselab.evaluation import perplexity
from sparselab.experiment import RunConfig, TextConfig, Workbench
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.inputs import batches, check_tokens
from sparselab.pruning import check_model

# Passes of the blocks over the calibration windows that a whole run of a method costs, as measured on two CPU cores.
_PASSES = {"magnitude": 0.05, "wanda": 1.7, "sparsegpt": 2.4}
_COLUMNS = ["method", "pattern", "sparsity", "perplexity", "stderr", "ratio", "relative_error", "seconds"]


@dataclass(frozen=True)
class CompareConfig(TextConfig):
    """What is compared, and on which text.

    Args:
        dataset, eval_dataset, seqlen, eval_nsamples: see `TextConfig`.
        methods: keys of `sparselab.methods.METHODS`.
        sparsities: fractions, percentages or N:M.
        percdamp, blocksize: of SparseGPT.
        nsamples: calibration windows.
        seed: of the calibration draw.
    """

    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    sparsities: tuple[str, ...] = ("50%", "60%", "70%", "2:4")
    percdamp: float = 0.01
    blocksize: int = 128
    nsamples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("methods", "sparsities"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"{name}: expected several in a tuple, received {getattr(self, name)!r}")
        if not self.runs():
            raise ValueError("methods, sparsities: expected at least one of each, received none")

    def runs(self) -> list[RunConfig]:
        """Every method at every sparsity."""
        return [
            RunConfig(method, sparsity, self.percdamp, self.blocksize, self.nsamples, self.seed)
            for sparsity in self.sparsities
            for method in self.methods
        ]


@dataclass
class Comparison:
    """Results so far, and what they are results of.

    Args:
        config: what was asked for.
        model: name of the model.
        runs: one row a run, the dense model first: method, pattern, sparsity (realised), perplexity, stderr, ratio (to
            dense), relative_error (mean over layers, see `Workbench`), seconds and peak_memory_mb (of calibration and
            solve, besides the loaded model).
        layers: one row a layer of each run: method, pattern, seed, block, layer, sparsity, relative_error.
    """

    config: CompareConfig
    model: str
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def caption(self) -> str:
        """What every figure and table has to state."""
        return caption(self.model, self.config, self.config.nsamples, (self.config.seed,))

    @property
    def table(self) -> pd.DataFrame:
        """The runs as text to print: numbers rounded, nothing where nothing was measured."""
        return as_text(self.runs)

    def save(self, folder: Path) -> None:
        """Write `runs.csv`, `layers.csv`, the table as `runs.md`, and the settings."""
        files.write_text(folder / "runs.csv", self.runs.to_csv(index=False))
        files.write_text(folder / "runs.md", files.markdown_table(self.table))
        files.write_text(folder / "layers.csv", self.layers.to_csv(index=False))
        files.write_stamp(folder, "compare", {"model": self.model} | asdict(self.config))


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CompareConfig | None = None,
    name: str = "model",
    out: Path | None = None,
    progress: bool = True,
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

    Raises:
        ValueError, SparselabError: see `prune` and `perplexity`. What is finished by then has been written to `out`.
    """
    config = config or CompareConfig()
    if out is not None and not out.is_dir():
        raise ValueError(f"out: expected an existing folder, received {out}")
    bench, runs = _checked_bench(model, tokenizer, name, config), config.runs()
    result = Comparison(config, name)
    with tqdm(total=len(runs) + 1, desc="dense", unit="run", disable=not progress) as bar:
        result.runs = dense_row(bench)
        bar.update()
        for run in runs:
            bar.set_description(f"{run.method} {run.sparsity}")
            done = bench.run(run)
            if done.row["failure"]:
                raise SingularHessianError(done.row["failure"])
            row = pd.DataFrame([done.row]).reindex(columns=[*_COLUMNS, "peak_memory_mb"])
            result.runs = pd.concat([result.runs, row], ignore_index=True)
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
    check_tokens(decoder, bench.calibration(config.nsamples, config.seed))
    return bench


def dense_row(bench: Workbench) -> pd.DataFrame:
    """The dense model as the first row of a table of runs."""
    row = {"method": "dense", "pattern": "", "sparsity": 0.0, "ratio": 1.0}
    return pd.DataFrame([row | {"perplexity": float(bench.dense), "stderr": bench.dense.stderr}]).reindex(
        columns=[*_COLUMNS, "peak_memory_mb"]
    )


def as_text(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs as text to print: numbers rounded, perplexity with its error, nothing where nothing was measured."""
    formats = {"sparsity": "{:.2%}", "ratio": "{:.3f}", "relative_error": "{:.4f}", "seconds": "{:.2f}"}
    shown = {name: runs[name].map(form.format) for name, form in formats.items()}
    shown["perplexity"] = runs.perplexity.map("{:.2f} ± ".format) + runs.stderr.map("{:.2f}".format)
    shown["peak_memory_mb"] = runs.peak_memory_mb.map("{:.0f}".format)
    return runs.assign(**shown).drop(columns="stderr").replace(["nan", "nan%", "nan ± nan"], "")


def caption(model: str, text: TextConfig, nsamples: int | str, seeds: tuple[int, ...]) -> str:
    """What every figure and table has to state: model, tokens and seeds."""
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    calibrated = f"{nsamples} × {text.seqlen} tokens of {corpora.describe(text.dataset)} ({which})"
    evaluated = f"{text.eval_nsamples} × {text.seqlen} tokens of {corpora.describe(text.eval_dataset)}"
    return f"{model}; calibrated on {calibrated}, evaluated on {evaluated}"


def estimate_seconds(model: PreTrainedModel, config: CompareConfig) -> float:
    """About how long `compare` will take, from the speed of a few batches of the model's own blocks."""
    decoder = Decoder(model)
    tokens = torch.zeros(64, config.seqlen, dtype=torch.long)
    with evaluating(model):
        tried = next(batches(tokens, None, decoder.device))
        perplexity(model, tried, progress=False)  # the first call pays for allocations
        started = time.perf_counter()
        for _ in range(3):
            perplexity(model, tried, progress=False)
    per_window = (time.perf_counter() - started) / 3 / len(tried)
    evaluation = per_window * config.eval_nsamples * (1 + len(config.methods) * len(config.sparsities))
    passes = 2.0 + len(config.sparsities) * sum(_PASSES[method] for method in config.methods)
    return evaluation + passes * per_window * config.nsamples
