"""Parameters of sweeps and of their notebooks, checked before anything is loaded.

papermill does not check the types of parameters and only warns of a misspelt name, so a notebook has to. Nothing heavy
is imported before names and types are known to be right.
"""

import ast
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "propagate": (str,),
    "wbits": (int, NoneType),
    "true_sequential": (bool,),
    "bos": (str,),
    "eval_dataset": (str,),
    "eval_nsamples": (int,),
    "measure": (str,),
    "out": (str,),
}
REPORT_PARAMETERS: dict[str, tuple[type, ...]] = {"folder": (str,), "where": (str,)}

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}


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
        measure: what is measured after it, see `sparselab.experiment.Workbench`.
        out: folder below which results are kept.
    """

    run: "RunConfig"
    text: "TextConfig"
    model: str = "tiny"
    measure: str = "perplexity+errors+gap"
    out: Path = field(default_factory=lambda: Path("runs"))

    def __post_init__(self) -> None:
        from sparselab.experiment import check_measure

        object.__setattr__(self, "measure", check_measure(self.measure))

    @property
    def parameters(self) -> dict[str, Any]:
        """As `checked_run` takes them."""
        holders = (self.run, self.text, self)
        values = {name: getattr(next(each for each in holders if hasattr(each, name)), name) for name in RUN_PARAMETERS}
        return values | {"out": str(self.out)}

    def __str__(self) -> str:
        """Which run it is, as a message says it."""
        run = self.run
        return in_words(self.model, run.method, run.sparsity, run.percdamp, run.nsamples, run.seed)


def in_words(model: str, method: str, pattern: object, percdamp: float, nsamples: int, seed: int) -> str:
    """Which run it is, by what most often differs; see `RunConfig`."""
    return f"{model}, {method} {pattern}, percdamp {percdamp:g}, {nsamples} windows, seed {seed}"


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
        known: the types each parameter may have, of int, float, str, bool and None's.

    Raises:
        ParameterError: an unknown name, or a wrong type.
    """
    for name in _assigned(given["In"]) if "In" in given else given:
        if name not in known:
            hint = _nearest(name, known) or f"; there are {', '.join(known)}"
            raise ParameterError(f"{name}: expected the name of a parameter, received another{hint}")
    values = {name: given[name] for name in known if name in given}
    for name, value in values.items():
        types = known[name]
        if type(value) is int and float in types:
            values[name] = float(value)
        elif type(value) not in types:
            words = " or ".join(_WORDS[kind] for kind in types)
            raise ParameterError(f"{name}: expected {words}, received {value!r}")
    return values


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
    close = difflib.get_close_matches(str(name), known, 1)  # YAML has names that are numbers
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
