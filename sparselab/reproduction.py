"""The papers' tables made again for one model: every method and pattern, measured on the papers' texts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import corpora, files, manifest, papers, sources
from sparselab.evaluation import perplexity
from sparselab.experiment import RunConfig, check_several
from sparselab.journal import Journal
from sparselab.methods import PUBLISHED
from sparselab.models.blocks import Decoder
from sparselab.models.inputs import check_tokens
from sparselab.papers import DENSE, DIFFERS, Protocol, Row
from sparselab.progress import Progress
from sparselab.pruning import check_model, prune
from sparselab.quality import Weights, copy_weights, dense_again

_MEASURED = ["method", "pattern", "dataset", "windows", "perplexity", "stderr"]


@dataclass(frozen=True)
class TableConfig:
    """What is pruned and measured; as it stands, what the papers did.

    Args:
        methods: keys of `sparselab.methods.METHODS`.
        sparsities: fractions, percentages or N:M.
        dataset: calibration text by name, see `sources.source`.
        eval_datasets: evaluation texts by name; each model is measured on all of them.
        nsamples: calibration windows.
        eval_nsamples: evaluation windows of each text; None takes all there are.
        seqlen: tokens a window; None is 2048, or the model's context if that is shorter.
        seed: of the calibration draw.
    """

    methods: tuple[str, ...] = PUBLISHED
    sparsities: tuple[str, ...] = ("50%", "4:8", "2:4")
    dataset: str = "c4"
    eval_datasets: tuple[str, ...] = tuple(sources.PAPERS)
    nsamples: int = 128
    eval_nsamples: int | None = None
    seqlen: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_several(self, "methods", "sparsities", "eval_datasets")
        for name, least in (("seqlen", 2), ("eval_nsamples", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, received {value}")
        sources.check_name(self.dataset)
        for dataset in self.eval_datasets:
            sources.check_name(dataset)
            sources.check_apart(self.dataset, dataset)
        self.runs()  # each of which checks itself

    def runs(self) -> list[RunConfig]:
        """Every method at every sparsity, once."""
        runs = [
            RunConfig(method, sparsity, nsamples=self.nsamples, seed=self.seed)
            for sparsity in self.sparsities
            for method in self.methods
        ]
        return list(dict.fromkeys(runs))


@dataclass(frozen=True)
class PapersTable:
    """A model's perplexity and what each method makes of it, beside the published figures.

    Args:
        rows: one a method, pattern and evaluation text, the dense model first: method, pattern, dataset, windows,
            perplexity and stderr (over windows); published, uncertainty, difference, verdict and source, see
            `papers.beside`.
        model: its name.
        used: how it was measured.
        seed: of the calibration draw.
    """

    rows: pd.DataFrame
    model: str
    used: Protocol
    seed: int

    @property
    def caption(self) -> str:
        """What the table has to state."""
        used = self.used
        return (
            f"{self.model}; calibrated on {used.nsamples} × {used.seqlen} tokens of {used.calibration} "
            f"(seed {self.seed}), evaluated on windows of {used.seqlen} tokens; perplexity ± standard error over "
            f"windows; agrees: within {papers.TOLERANCE:.0%} of a published figure (dense: "
            f"{papers.DENSE_TOLERANCE:.1%}); order only: papers do not agree on this number"
        )

    @property
    def table(self) -> pd.DataFrame:
        """The rows as text to print: numbers rounded, nothing where nothing is published."""
        rows = self.rows
        shown = {
            "perplexity": _with_error(rows.perplexity.map("{:.2f}".format), rows.stderr.map("{:.2f}".format)),
            "published": _with_error(rows.published.map("{:g}".format), rows.uncertainty.map("{:g}".format)),
            "difference": rows.difference.map(_per_cent),
        }
        text = rows.assign(**shown).drop(columns=["stderr", "uncertainty"])
        return text.replace(["nan", "+nan%"], "")

    def save(self, folder: Path) -> None:
        """Write `table.csv`, and the table as `table.md`."""
        files.write_text(folder / "table.csv", self.rows.to_csv(index=False))
        files.write_text(folder / "table.md", f"{files.markdown_table(self.table)}\n{self.caption}\n")


def papers_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TableConfig | None = None,
    name: str = "model",
    out: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    tell: Callable[[str], object] = lambda _: None,
    request: manifest.Request | None = None,
) -> PapersTable:
    """Prune one model by every method at every sparsity, once each, and measure all of them on the papers' texts.

    The dense model comes first: `tell` hears of its perplexity on each text as soon as that is known, since where it
    is not the published one, all that follows is worthless. What the verdicts mean stands at `papers.beside`.

    Args:
        model: a causal language model; unchanged in the end.
        tokenizer: its tokenizer.
        config: see `TableConfig`.
        name: what to call the model; its last part says which published figures are its own.
        out: existing folder, to write to and to keep what is finished in.
        resume: go on with what an interrupted call has left in `out`; methods and patterns may be other ones.
        progress: show bars.
        tell: called with a line about each text's dense perplexity, and about anything that has to be done again.
        request: who asked for it, for the manifest.

    Raises:
        OutputError: `out` holds what an earlier call has finished: without `resume`, or of other inputs.
        ValueError, SparselabError: see `prune` and `perplexity`.
    """
    config = config or TableConfig()
    if out is not None and not out.is_dir():
        raise ValueError(f"out: expected an existing folder, received {out}")
    bench, known = _Bench(model, tokenizer, config), papers.published(name)
    made = _begun(bench, config, name, request)
    if out is not None:
        journal = Journal(out / files.JOURNAL, _identity(made), resume)
        if journal.damage:
            tell(journal.damage)
        bench.keep_in(journal)
    rows = []
    for dataset in bench.held_out:
        rows += bench.rows(None, [dataset], progress)
        tell(_about_dense(papers.beside(rows[-1:], known, bench.used)[0]))
    for run in (bar := tqdm(config.runs(), unit="run", disable=not progress)):
        bar.set_description(f"{run.method} {run.sparsity}")
        rows += bench.rows(run, list(bench.held_out))
    table = PapersTable(pd.DataFrame(papers.beside(rows, known, bench.used)), name, bench.used, config.seed)
    if out is not None:
        table.save(out)
        manifest.finish(out, made, {"rows": table.rows[_MEASURED]}, ["table.csv"])
    return table


class _Bench:
    """A model and its texts at hand, once all is known to be well that can be known; nothing is measured twice."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TableConfig) -> None:
        decoder = Decoder(model)
        decoder.check_whole()
        check_model(decoder, [run.settings for run in config.runs()])
        seqlen = config.seqlen or min(2048, decoder.positions or 2048)
        self.model, self.tokenizer = model, tokenizer
        self.used = Protocol(seqlen, str(config.dataset), config.nsamples, config.eval_nsamples)
        self.calib = corpora.calibration_tokens(tokenizer, config.dataset, config.nsamples, seqlen, config.seed)
        self.held_out: dict[str, Int[Tensor, "n seqlen"]] = {
            str(dataset): corpora.evaluation_tokens(tokenizer, dataset, config.eval_nsamples, seqlen)
            for dataset in config.eval_datasets
        }
        for windows in (self.calib, *self.held_out.values()):
            check_tokens(decoder, windows)
        self._rows: dict[tuple[str, str, str], Row] = {}
        self._journal: Journal | None = None

    def keep_in(self, journal: Journal) -> None:
        """Know what it says, and add to it."""
        self._journal = journal
        self._rows = {(row["method"], row["pattern"], row["dataset"]): row for row in journal.entries}

    def rows(self, run: RunConfig | None, datasets: Sequence[str], progress: Progress = False) -> list[Row]:
        """A pruned model, or the dense one, on some texts: those that were not measured before are now."""
        method, pattern = (run.method, str(run.sparsity)) if run else (DENSE, "")
        missing = [dataset for dataset in datasets if (method, pattern, dataset) not in self._rows]
        if missing:
            with dense_again(self.model, self._dense_weights):
                if run:
                    prune(self.model, self.calib, method, pattern, measure_error=False, progress=progress)
                for dataset in missing:
                    self._measure(method, pattern, dataset, progress)
        return [self._rows[method, pattern, dataset] for dataset in datasets]

    @cached_property
    def _dense_weights(self) -> Weights:
        return copy_weights(self.model)

    def _measure(self, method: str, pattern: str, dataset: str, progress: Progress) -> None:
        ppl = perplexity(self.model, self.held_out[dataset], progress=progress)
        row: Row = {"method": method, "pattern": pattern, "dataset": dataset}
        row |= {"windows": len(ppl.nll), "perplexity": float(ppl), "stderr": ppl.stderr}
        if self._journal:
            self._journal.append(row)
        self._rows[method, pattern, dataset] = row


def _begun(bench: _Bench, config: TableConfig, name: str, request: manifest.Request | None) -> manifest.Manifest:
    """The manifest, but for the results."""
    model, device = bench.model, bench.model.device
    inputs = {"model": manifest.model_record(name, model.config, manifest.weights_hash(model))}
    inputs["calibration"] = manifest.windows_record(bench.calib, bench.tokenizer, config.dataset)
    for dataset, windows in bench.held_out.items():
        inputs[f"evaluation, {dataset}"] = manifest.windows_record(windows, bench.tokenizer, dataset)
    settings: dict[str, Any] = {"model": name, "device": device.type, "dtype": model.dtype} | asdict(config)
    settings |= {"sparsity": settings.pop("sparsities"), "eval_dataset": settings.pop("eval_datasets")}
    return manifest.begin("table", settings, inputs, manifest.machine_record(device, model.dtype), request)


def _identity(made: manifest.Manifest) -> dict[str, Any]:
    """What has to be the same for an interrupted table to go on, short enough to be told."""
    texts = {name: record for name, record in made["inputs"].items() if name != "model"}
    model = made["inputs"]["model"]
    return {
        "model": f"{model['weights'][:16]}, {model['config'][:16]}",
        **{
            name: f"{record['windows']} × {record['seqlen']} tokens of {record['dataset']} ({record['sha256'][:16]})"
            for name, record in texts.items()
        },
        "device": made["machine"]["device"],
        "versions": made["versions"],
    }


def _about_dense(row: Row) -> str:
    """A line for the screen."""
    text = f"dense on {row['dataset']}: {row['perplexity']:.2f} ± {row['stderr']:.2f}; "
    if not row["source"]:
        return f"{text}nothing is published"
    text += f"published {row['published']:g} ({row['source']}): {row['verdict']}"
    if row["verdict"] != DIFFERS:
        return text
    return f"{text} by {_per_cent(row['difference'])}; look at model, tokenizer and text before you trust what follows"


def _per_cent(value: float) -> str:
    return f"{value:+.1f}%".replace("-", "−")


def _with_error(values: "pd.Series[str]", errors: "pd.Series[str]") -> "pd.Series[str]":
    return (values + " ± " + errors).str.removesuffix(" ± nan")
