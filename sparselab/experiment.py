"""The main job: one model pruned several ways on the same windows, and what each way cost."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import corpora, files
from sparselab.evaluation import Perplexity, perplexity
from sparselab.models.blocks import Decoder, evaluating, read_weight, write_weight
from sparselab.models.inputs import batches
from sparselab.pruning import METHODS, Report, collect, prune
from sparselab.solvers import InputStatistics, parse_sparsity, relative_error

# Passes of the blocks over the calibration windows that a whole run of a method costs, as measured on two CPU cores.
_PASSES = {"magnitude": 0.05, "wanda": 2.1, "sparsegpt": 2.6}


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and on which text.

    Args:
        methods: keys of `sparselab.pruning.METHODS`.
        sparsities: fractions, percentages or N:M.
        percdamp, blocksize: of SparseGPT.
        dataset: calibration text, see `corpora.documents`.
        eval_dataset: evaluation text; "stdlib" is read on its held-out side.
        nsamples: calibration windows.
        eval_nsamples: evaluation windows.
        seqlen: tokens a window, for both.
        seed: of the calibration draw.
    """

    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    sparsities: tuple[str, ...] = ("50%", "60%", "70%", "2:4")
    percdamp: float = 0.01
    blocksize: int = 128
    dataset: corpora.Dataset = "stdlib"
    eval_dataset: corpora.Dataset = "stdlib"
    nsamples: int = 128
    eval_nsamples: int = 400
    seqlen: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            received = ", ".join(unknown) or "none"
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, received {received}")
        if not self.sparsities:
            raise ValueError("sparsities: expected at least one, received none")
        for sparsity in self.sparsities:
            parse_sparsity(sparsity)
        if self.dataset == self.eval_dataset != "stdlib":
            raise ValueError(
                f"dataset: calibration and evaluation would both read {corpora.describe(self.dataset)}; "
                "name another text for one of them"
            )


@dataclass
class Comparison:
    """Results so far, and what they are results of.

    Args:
        config: what was asked for.
        model: name of the model.
        runs: one row a run: method, pattern, sparsity (realised), perplexity, stderr, ratio (to dense), relative_error
            (mean over layers, on the dense model's inputs), seconds and peak_memory_mb (of calibration and solve, above
            the loaded model).
        layers: one row a layer of each run: method, pattern, block, layer, sparsity, relative_error.
    """

    config: CompareConfig
    model: str
    runs: pd.DataFrame
    layers: pd.DataFrame

    @property
    def caption(self) -> str:
        """What every figure and table has to state."""
        to = self.config
        calibrated = f"{to.nsamples} × {to.seqlen} tokens of {corpora.describe(to.dataset)} (seed {to.seed})"
        evaluated = f"{to.eval_nsamples} × {to.seqlen} tokens of {corpora.describe(to.eval_dataset)}"
        return f"{self.model}; calibrated on {calibrated}, evaluated on {evaluated}"

    @property
    def table(self) -> pd.DataFrame:
        """The runs as text to print: numbers rounded, nothing where nothing was measured."""
        runs = self.runs
        formats = {"sparsity": "{:.2%}", "ratio": "{:.3f}", "relative_error": "{:.4f}", "seconds": "{:.2f}"}
        shown = {name: runs[name].map(form.format) for name, form in formats.items()}
        shown["perplexity"] = runs.perplexity.map("{:.2f} ± ".format) + runs.stderr.map("{:.2f}".format)
        shown["peak_memory_mb"] = runs.peak_memory_mb.map("{:.0f}".format)
        return runs.assign(**shown).drop(columns="stderr").replace("nan", "")

    def add(self, report: Report | None, ppl: Perplexity, baseline: Perplexity, errors: dict[str, float]) -> None:
        """Add a run (None: the dense model) with its perplexity and its error in each layer, by full name."""
        row = {"method": "dense", "pattern": "", "sparsity": 0.0} | {
            "perplexity": float(ppl),
            "stderr": ppl.stderr,
            "ratio": float(ppl) / float(baseline),
        }
        if report is not None:
            about = {"method": report.settings.method, "pattern": str(report.settings.pattern)}
            layers = report.layers[["block", "layer", "sparsity"]].assign(**about, relative_error=list(errors.values()))
            self.layers = pd.concat([self.layers, layers], ignore_index=True)
            row |= about | {
                "sparsity": report.sparsity,
                "relative_error": layers.relative_error.mean(),
                "seconds": report.seconds,
                "peak_memory_mb": report.peak_memory / 1e6,
            }
        self.runs = pd.concat([self.runs, pd.DataFrame([row])], ignore_index=True)

    def save(self, folder: Path) -> None:
        """Write `runs.csv`, `layers.csv`, the table as `runs.md`, and the settings."""
        files.write_stamp(folder, "compare", {"model": self.model} | asdict(self.config))
        files.write_text(folder / "runs.csv", self.runs.to_csv(index=False))
        files.write_text(folder / "runs.md", files.markdown_table(self.table))
        files.write_text(folder / "layers.csv", self.layers.to_csv(index=False))


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
    what its method needs; layer errors are measured apart, on one set of inputs: those of the dense model.

    Args:
        model: a causal language model; unchanged in the end.
        tokenizer: its tokenizer.
        config: see `CompareConfig`.
        name: what to call the model.
        out: existing folder to write to after every run.
        progress: show a bar.

    Raises:
        ValueError, SparselabError: see `prune` and `perplexity`.
    """
    config = config or CompareConfig()
    calib = corpora.calibration_tokens(tokenizer, config.dataset, config.nsamples, config.seqlen, config.seed)
    held_out = corpora.evaluation_tokens(tokenizer, config.eval_dataset, config.eval_nsamples, config.seqlen)
    decoder = Decoder(model)
    dense = {layer: read_weight(linear).clone() for layer, linear in decoder.linears().items()}
    runs = [(sparsity, method) for sparsity in config.sparsities for method in config.methods]
    result = Comparison(config, name, pd.DataFrame(), pd.DataFrame())
    with tqdm(total=len(runs) + 1, desc="dense", unit="run", disable=not progress) as bar:
        baseline = perplexity(model, held_out, progress=False)
        statistics = collect(model, calib, progress=False)
        result.add(None, baseline, baseline, {})
        bar.update()
        for sparsity, method in runs:
            bar.set_description(f"{method} {sparsity}")
            try:
                report = prune(
                    model,
                    calib,
                    method,
                    sparsity,
                    config.percdamp,
                    config.blocksize,
                    measure_error=False,
                    progress=False,
                )
                errors = _errors(decoder, dense, statistics)
                result.add(report, perplexity(model, held_out, progress=False), baseline, errors)
            finally:
                for layer, linear in decoder.linears().items():
                    write_weight(linear, dense[layer])
            if out is not None:
                result.save(out)
            bar.update()
    return result


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


def _errors(
    decoder: Decoder, dense: dict[str, Float[Tensor, "d_out d_in"]], statistics: dict[str, InputStatistics]
) -> dict[str, float]:
    return {
        layer: relative_error(dense[layer], read_weight(linear), statistics[layer].hessian)
        for layer, linear in decoder.linears().items()
    }
