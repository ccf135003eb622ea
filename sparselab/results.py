"""What sweeps have left on disk: all results below a folder as a table, and cut into what one figure shows."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from sparselab.comparison import caption
from sparselab.experiment import FAILURE, RESULT, TextConfig
from sparselab.methods import METHODS
from sparselab.parameters import ParameterError, in_words

# Columns of results: what a model is measured on, and what is done to it, besides the method and the seed.
TEXT_COLUMNS = ("model", "dataset", "eval_dataset", "seqlen", "eval_nsamples", "bos", "measure")
SETTING_COLUMNS = ("pattern", "percdamp", "blocksize", "nsamples", "propagate", "wbits", "true_sequential")
_MEASURED = [
    "sparsity", "perplexity", "stderr", "ratio", "relative_error", "calibration_error", "optimality_gap", "seconds",
    "peak_memory_mb",
]  # fmt: skip


def read_sweep(folder: str | Path, where: str = "") -> pd.DataFrame:
    """All runs kept below a folder, a row each, sorted by their settings, with every column even if all have failed.

    Args:
        folder: where a sweep, or `sweep_run`, kept them.
        where: which of them, as a pandas query on the columns: 'method != "magnitude" and seqlen == 256'.

    Raises:
        ParameterError: there are none, a file is damaged, or the filter is wrong or leaves none.
    """
    try:
        results = read_results(Path(folder))
    except ValueError as error:
        raise ParameterError(f"folder: {error}") from error
    try:
        chosen = results.query(where) if where else results
    except Exception as error:  # pandas and the parser below it each raise their own
        columns, cause = ", ".join(results.columns), " ".join(str(error).split())
        raise ParameterError(f"where: expected a pandas query on {columns}; received {where!r} ({cause})") from error
    if chosen.empty:
        raise ParameterError(f"where: expected a filter that leaves results, received {where!r}, which leaves none")
    return chosen


def read_results(folder: Path) -> pd.DataFrame:
    """The rows of all runs kept below a folder; see `read_runs`.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    folders = {path.parent for name in (RESULT, FAILURE) for path in folder.rglob(name)}
    if not folders:
        raise ValueError(f"{folder}: expected results of runs ({RESULT} in folders), found none")
    return read_runs(sorted(folders))


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """A row a run, sorted by settings: the model's name, its texts, and what `Result` says of its row.

    Args:
        folders: of runs; those in which none is kept are passed over.

    Raises:
        ValueError: a file is damaged.
    """
    kept = [_read(path) for each in folders if (path := _kept(each, RESULT, FAILURE))]
    results = pd.DataFrame(
        [{"model": each["model"], "measure": each.get("measure")} | each["text"] | each["row"] for each in kept]
    )
    names = [*results.columns, *TEXT_COLUMNS, *SETTING_COLUMNS, *_MEASURED]
    results = results.reindex(columns=list(dict.fromkeys(names))).sort_values([*SETTING_COLUMNS, "seed"])
    order = {method: number for number, method in enumerate(METHODS)}
    by_mask = results.method.str.partition("+")[0].map(lambda mask: order.get(mask, len(order)))
    return results.iloc[by_mask.argsort(kind="stable")].reset_index(drop=True)


def read_failure(folder: Path) -> str:
    """Why the run that is kept in a folder has failed; nothing if it has not, or none is kept there.

    Raises:
        ValueError: a file is damaged.
    """
    path = _kept(folder, FAILURE, RESULT)
    return str(_read(path)["row"]["failure"]) if path else ""


def failures(results: pd.DataFrame) -> list[str]:
    """A line for each run that has failed: which it is, and why.

    Args:
        results: from `read_sweep`.
    """
    return [
        f"{in_words(row.model, row.method, row.pattern, row.percdamp, row.nsamples, row.seed)}: {row.failure}"
        for _, row in results[results.failure != ""].iterrows()
    ]


def _kept(folder: Path, *names: str) -> Path | None:
    """The first of these files that is there."""
    return next((path for name in names if (path := folder / name).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.keys() >= {"model", "text", "row"}:
            return kept
    except ValueError:
        pass
    raise ValueError(f"{path}: expected a result of a run, found a damaged file; remove it")


@dataclass(frozen=True)
class Panel:
    """Runs that differ in one setting, the method and the seed: what one figure shows.

    Args:
        runs: a row a run.
        caption: everything they have in common.
        dense: perplexity of the dense model; None if no run got as far.
    """

    runs: pd.DataFrame
    caption: str
    dense: float | None

    @property
    def measured(self) -> Literal["perplexity", "relative_error"]:
        """What a figure can show of the runs: their perplexity, or of those without one the error of layers."""
        only_errors = self.runs.perplexity.isna().all() and self.runs.relative_error.notna().any()
        return "relative_error" if only_errors else "perplexity"


Varied = Literal["sparsity", "percdamp", "nsamples"]
VARIED: tuple[Varied, ...] = get_args(Varied)


def column_of(x: str) -> str:
    """The column of results that says what a setting was; of the sparsity, what was asked for."""
    return "pattern" if x == "sparsity" else x


def panels(results: pd.DataFrame, x: Varied) -> list[Panel]:
    """Results cut into sets in which this setting varies; none where it does not.

    Args:
        results: from `read_sweep`; against sparsity, runs by rules for some layers are passed over.
        x: the setting.
    """
    if x == "sparsity":
        results = results[~results.pattern.str.contains("=")]
    return [panel for panel in sets(results, x) if panel.runs[column_of(x)].nunique() > 1]


def sets(results: pd.DataFrame, x: Varied) -> list[Panel]:
    """Results cut into sets in which nothing but this setting, the method and the seed varies.

    Args:
        results: from `read_sweep`.
        x: the setting.
    """
    varied = column_of(x)
    fixed = [results[name].astype(str) for name in (*TEXT_COLUMNS, *SETTING_COLUMNS) if name != varied]
    groups = results.groupby(fixed, sort=False, dropna=False)
    return [Panel(group, _caption(group, varied), _dense(group)) for _, group in groups]


def _caption(runs: pd.DataFrame, varied: str) -> str:
    first = runs.iloc[0]
    bos: Any = first.bos if isinstance(first.bos, str) else "document"  # earlier versions did not keep it
    text = TextConfig(first.dataset, first.eval_dataset, int(first.seqlen), int(first.eval_nsamples), bos)
    nsamples = "–".join(map(str, sorted({runs.nsamples.min(), runs.nsamples.max()})))
    about = [] if varied == "pattern" else [f"{first.pattern} (realised {100 * runs.sparsity.mean():.2f}%)"]
    about += [] if varied == "percdamp" else [f"percdamp {first.percdamp:g}"]
    return "; ".join([*about, caption(first.model, text, nsamples, tuple(sorted(runs.seed.unique().tolist())))])


def _dense(runs: pd.DataFrame) -> float | None:
    dense = (runs.perplexity / runs.ratio).dropna()
    return float(dense.iloc[0]) if len(dense) else None
