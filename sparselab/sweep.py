"""What the sweep notebooks need: parameters checked before anything is loaded, results cut into figures.

papermill does not check the types of parameters and only warns of a misspelt name, so a notebook has to. Nothing heavy
is imported before names and types are known to be right.
"""

import ast
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from sparselab.experiment import RunConfig, TextConfig

RUN_PARAMETERS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "dataset": (str,),
    "method": (str,),
    "sparsity": (float, str),
    "percdamp": (float,),
    "nsamples": (int,),
    "seqlen": (int,),
    "seed": (int,),
    "blocksize": (int,),
    "eval_dataset": (str,),
    "eval_nsamples": (int,),
    "out": (str,),
}
REPORT_PARAMETERS: dict[str, tuple[type, ...]] = {"folder": (str,), "where": (str,)}

# Columns of results: what a model is measured on, and what is done to it, besides the method and the seed.
TEXT_COLUMNS = ("model", "dataset", "eval_dataset", "seqlen", "eval_nsamples")
SETTING_COLUMNS = ("pattern", "percdamp", "blocksize", "nsamples", "propagate")

_WORDS = {int: "a whole number", float: "a number", str: "text"}
_MEASURED = [
    "sparsity", "perplexity", "stderr", "ratio", "relative_error", "calibration_error", "optimality_gap", "seconds",
    "peak_memory_mb",
]  # fmt: skip


class ParameterError(ValueError):
    """A parameter is misspelt, of a wrong type, or of a value that cannot work; notebooks show one line of it."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, checked.

    Args:
        run: what is done to the model.
        text: what it is calibrated and measured on.
        model: a name for `sparselab.load`.
        out: folder below which results are kept.
    """

    run: "RunConfig"
    text: "TextConfig"
    model: str = "tiny"
    out: Path = field(default_factory=lambda: Path("runs"))


def checked_run(given: Mapping[str, Any]) -> SweepRun:
    """The parameters of `notebooks/sweep_run.ipynb` as settings of a run, or one line on what is wrong with them.

    Args:
        given: `globals()` of the notebook, or a dict of parameters; what is missing has its default.

    Raises:
        ParameterError: an unknown name, a wrong type or a value that cannot work; says what was expected, what came,
            and the nearest name that would do.
    """
    from sparselab import sources

    values = checked_values(given, RUN_PARAMETERS)
    for name in ("dataset", "eval_dataset"):
        try:
            sources.check_name(values.get(name, "stdlib"))
        except ValueError as error:
            raise ParameterError(f"{name}: {str(error).partition(': ')[2]}, received {values[name]!r}") from error
    if "out" in values:
        values["out"] = _checked_folder(values["out"])
    return _configured(values)


def checked_values(given: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Those of the parameters that are given, with names and types checked; whole numbers pass for numbers.

    Args:
        given: `globals()` of a notebook, whose cells just before the running one set parameters; or a dict of nothing
            but parameters.
        known: the types each parameter may have, of int, float and str.

    Raises:
        ParameterError: an unknown name, or a wrong type.
    """
    for name in _assigned(given["In"]) if "In" in given else given:
        if name not in known:
            hint = _nearest(name, known) or f"; there are {', '.join(known)}"
            raise ParameterError(f"{name}: expected a parameter of this notebook, received another name{hint}")
    values = {name: given[name] for name in known if name in given}
    for name, value in values.items():
        types = known[name]
        if type(value) is int and float in types:
            values[name] = float(value)
        elif isinstance(value, bool) or not isinstance(value, types):
            words = " or ".join(_WORDS[kind] for kind in types)
            raise ParameterError(f"{name}: expected {words}, received {value!r}")
    return values


def read_sweep(folder: str | Path, where: str = "") -> "pd.DataFrame":
    """All results below a folder, a row a run, sorted by their settings, with every column even if all runs failed.

    Args:
        folder: where `sweep_run` kept them.
        where: which of them, as a pandas query on the columns: 'method != "magnitude" and seqlen == 256'.

    Raises:
        ParameterError: there are none, a file is damaged, or the filter is wrong or leaves none.
    """
    from sparselab.experiment import read_results
    from sparselab.methods import METHODS

    try:
        results = read_results(Path(folder))
    except ValueError as error:
        raise ParameterError(f"folder: {error}") from error
    results = results.reindex(columns=list(dict.fromkeys([*results.columns, *_MEASURED])))
    order = {method: number for number, method in enumerate(METHODS)}
    results = results.sort_values([*SETTING_COLUMNS, "seed"])
    results = results.sort_values("method", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    try:
        chosen = results.query(where) if where else results
    except Exception as error:  # pandas and the parser below it each raise their own
        columns, cause = ", ".join(results.columns), " ".join(str(error).split())
        raise ParameterError(f"where: expected a pandas query on {columns}; received {where!r} ({cause})") from error
    if chosen.empty:
        raise ParameterError(f"where: expected a filter that leaves results, received {where!r}, which leaves none")
    return chosen


@dataclass(frozen=True)
class Panel:
    """Runs that differ in one setting and the seed: what one figure shows.

    Args:
        runs: a row a run.
        caption: everything they have in common.
        dense: perplexity of the dense model; None if no run got as far.
    """

    runs: "pd.DataFrame"
    caption: str
    dense: float | None


def panels(results: "pd.DataFrame", x: Literal["sparsity", "percdamp", "nsamples"]) -> list[Panel]:
    """Results cut into sets in which only this setting, the method and the seed vary; none where it does not vary.

    Args:
        results: from `read_sweep`.
        x: the setting.
    """
    varied = "pattern" if x == "sparsity" else x
    fixed = [results[name].astype(str) for name in (*TEXT_COLUMNS, *SETTING_COLUMNS) if name != varied]
    groups = [group for _, group in results.groupby(fixed, sort=False) if group[varied].nunique() > 1]
    return [Panel(group, _caption(group, varied), _dense(group)) for group in groups]


def _assigned(cells: Sequence[str]) -> list[str]:
    """The names set by the cells just before the running one that do nothing else: parameters, and papermill's own."""
    names: list[str] = []
    for cell in reversed(cells[:-1]):
        try:
            statements = ast.parse(cell).body
        except SyntaxError:
            break
        if not statements or not all(isinstance(each, ast.Assign | ast.AnnAssign) for each in statements):
            break
        targets = [node for each in statements for node in ast.walk(each) if isinstance(node, ast.Name)]
        names += [target.id for target in targets if isinstance(target.ctx, ast.Store)]
    return names


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _checked_folder(name: str) -> Path:
    """A folder that results can be written to; what does not exist yet is made with the first result."""
    folder = Path(name).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not name or not existing.is_dir():
        raise ParameterError(f"out: expected a folder, received {name!r}")
    if not os.access(existing, os.W_OK):
        raise ParameterError(f"out: expected a folder that can be written to, received {name!r}")
    return Path(name)


def _configured(values: dict[str, Any]) -> SweepRun:
    from sparselab.experiment import RunConfig, TextConfig
    from sparselab.methods import METHODS

    def of(kind: type) -> dict[str, Any]:
        return {each.name: values[each.name] for each in fields(kind) if each.name in values}

    try:
        return SweepRun(RunConfig(**of(RunConfig)), TextConfig(**of(TextConfig)), **of(SweepRun))
    except ValueError as error:
        hint = _nearest(values["method"], METHODS) if str(error).startswith("method:") else ""
        raise ParameterError(f"{error}{hint}") from error


def _caption(runs: "pd.DataFrame", varied: str) -> str:
    from sparselab.comparison import caption
    from sparselab.experiment import TextConfig

    first = runs.iloc[0]
    text = TextConfig(first.dataset, first.eval_dataset, int(first.seqlen), int(first.eval_nsamples))
    nsamples = "–".join(map(str, sorted({runs.nsamples.min(), runs.nsamples.max()})))
    about = [] if varied == "pattern" else [f"{first.pattern} (realised {100 * runs.sparsity.mean():.2f}%)"]
    about += [] if varied == "percdamp" else [f"percdamp {first.percdamp:g}"]
    return "; ".join([*about, caption(first.model, text, nsamples, tuple(sorted(runs.seed.unique().tolist())))])


def _dense(runs: "pd.DataFrame") -> float | None:
    dense = (runs.perplexity / runs.ratio).dropna()
    return float(dense.iloc[0]) if len(dense) else None
