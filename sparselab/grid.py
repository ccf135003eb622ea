"""A grid of runs: names of parameters, the values that each takes, all with all, and what is left out of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sparselab.experiment import RunConfig
from sparselab.methods import find
from sparselab.parameters import RUN_PARAMETERS, ParameterError, SweepRun, checked_run, checked_values

EXCLUDE = "exclude"
_PARAMETERS = {name: types for name, types in RUN_PARAMETERS.items() if name != "out"}

Given = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """Every run that a grid asks for, checked.

    Args:
        given: as it was described.
        values: of each parameter.
        runs: the runs, none twice, in the order of the grid: the last parameter changes first.
        excluded: combinations that were left out because the grid says so.
        same: combinations that are another one's run: "50%" beside 0.5, or other seeds of a method that reads no text
            (what is measured of it on calibration windows is measured on those of the first).
    """

    given: Mapping[str, Any]
    values: dict[str, list[Any]]
    runs: tuple[SweepRun, ...]
    excluded: int
    same: int

    def __str__(self) -> str:
        """How many runs, of what."""
        said = ", ".join(f"{len(values)} × {name}" for name, values in self.values.items() if len(values) > 1)
        less = [f"{self.excluded} excluded"] * bool(self.excluded) + [f"{self.same} the same as others"] * bool(
            self.same
        )
        return f"{len(self.runs)} runs ({'; '.join([said or 'one value each', *less])})"


def read_grid(given: Given, out: str | Path = "runs") -> Grid:
    """Check a grid and make its runs.

    Args:
        given: a YAML file, or what it would hold: a mapping from parameters of `notebooks/sweep_run.ipynb` to a value
            or a list of values, and `exclude`, a list of mappings of the same kind: what fits one of them in all that
            it says is left out.
        out: the folder that collects results.

    Raises:
        ParameterError: no such file, no YAML, an unknown parameter, a value that cannot work with some of the others,
            an exclusion that fits nothing, or nothing left to do. Says which.
    """
    where, described = ("grid", given) if isinstance(given, Mapping) else (str(given), _loaded(Path(given)))
    try:
        return _expanded(described, out)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from error


def read_values(name: str, text: str) -> list[Any]:
    """The values of a parameter as they stand in a line of YAML, with commas between.

    Args:
        name: of the parameter.
        text: such as "50%, 0.6, 2:4".

    Raises:
        ParameterError: it cannot be read.
    """
    try:
        values: list[Any] = _yaml().load(f"[{text}\n]")
    except YAMLError as error:
        raise ParameterError(
            f"{name}: expected values with commas between, such as have commas in quotes, received {text!r} "
            f"({_problem(error)})"
        ) from error
    return values


def as_values(value: Any) -> str:
    """One value, or several in a list, as `read_values` takes them."""
    return _in_a_line(_as_list(value))[1:-1]


def as_yaml(grid: Mapping[str, Any]) -> str:
    """A grid as a file of it is written."""
    return "".join(f"{name}: {_in_a_line([value])[1:-1]}\n" for name, value in grid.items())


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _in_a_line(values: list[Any]) -> str:
    writer, text = _yaml(), StringIO()
    writer.default_flow_style, writer.width = True, 10**6
    writer.dump([list(each) if _is_list(each) else each for each in values], text)
    return text.getvalue().strip()


def _loaded(path: Path) -> Any:
    try:
        return _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{path}: expected a grid in YAML, cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: expected a grid in YAML, found a file that is no text") from error
    except YAMLError as error:
        marked = error if isinstance(error, MarkedYAMLError) else None
        line = f"line {marked.problem_mark.line + 1}: " if marked and marked.problem_mark else ""
        raise ParameterError(f"{path}: expected a grid in YAML; {line}{_problem(error)}") from error


def _problem(error: YAMLError) -> str:
    marked = error if isinstance(error, MarkedYAMLError) else None
    return " ".join(str((marked and marked.problem) or error).split())


def _expanded(described: Any, out: str | Path) -> Grid:
    if not isinstance(described, Mapping) or not described:
        raise ParameterError(
            "expected parameters and their values, as in 'sparsity: [0.5, 0.6]', "
            f"received {'nothing' if not described else type(described).__name__}"
        )
    values = {name: _several(name, value) for name, value in described.items() if name != EXCLUDE}
    checked_values(dict.fromkeys(values), dict.fromkeys(_PARAMETERS, (type(None),)))  # names first
    combined = [dict(zip(values, point, strict=True)) for point in product(*values.values())]
    points = [checked_run({**each, "out": str(out)}) for each in combined]
    kept = _without(points, described.get(EXCLUDE))
    runs: dict[SweepRun, SweepRun] = {}
    for point in kept:
        runs.setdefault(_without_seed(point), point)
    if not runs:
        raise ParameterError(f"{EXCLUDE}: expected to leave some runs, it leaves none")
    return Grid(described, values, tuple(runs.values()), len(points) - len(kept), len(kept) - len(runs))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _as_list(value: Any) -> list[Any]:
    return list(value) if _is_list(value) else [value]


def _several(name: object, value: Any) -> list[Any]:
    values = _as_list(value)
    if not values:
        raise ParameterError(f"{name}: expected at least one value, received none")
    if nested := [each for each in values if isinstance(each, Mapping | list)]:
        raise ParameterError(f"{name}: expected values in one list, received {nested[0]!r} in it")
    return values


def _without(points: list[SweepRun], exclude: Any) -> list[SweepRun]:
    """Those that fit no exclusion."""
    rules = [exclude] if isinstance(exclude, Mapping) else exclude or []
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) and rule for rule in rules):
        raise ParameterError(
            f"{EXCLUDE}: expected a list of parameters and values, as in '- {{method: magnitude, seed: [1, 2]}}', "
            f"received {exclude!r}"
        )
    for rule in rules:
        wanted = {name: [_as_kept(name, each) for each in _several(name, value)] for name, value in rule.items()}
        left = [point for point in points if not _fits(point, wanted)]
        if len(left) == len(points):
            raise ParameterError(f"{EXCLUDE}: expected a rule that fits some runs, {dict(rule)!r} fits none")
        points = left
    return points


def _as_kept(name: str, value: Any) -> Any:
    """A value as runs have it."""
    value = checked_values({name: value}, _PARAMETERS)[name]
    return RunConfig(sparsity=value).sparsity if name == "sparsity" else value


def _fits(point: SweepRun, wanted: dict[str, list[Any]]) -> bool:
    known = point.parameters
    return all(known[name] in values for name, values in wanted.items())


def _without_seed(point: SweepRun) -> SweepRun:
    """What tells a run from others: of a method that reads no calibration text, the seed does not."""
    return point if find(point.run.method).needs != "nothing" else replace(point, run=replace(point.run, seed=0))
