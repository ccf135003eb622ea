"""A form for a grid: a field for each parameter, how many runs that makes, and the runs at the press of a button."""

import html
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ipywidgets import HTML, BoundedIntText, Button, Checkbox, Layout, Text

from sparselab import sweeps
from sparselab.engines import Pool
from sparselab.experiment import RunConfig, TextConfig
from sparselab.figures.found import found
from sparselab.grid import EXCLUDE, as_values, as_yaml, read_grid, read_values
from sparselab.parameters import RUN_PARAMETERS, ParameterError, SweepRun
from sparselab.results import failures, read_sweep
from sparselab.widgets.job import Work
from sparselab.widgets.panel import View, row
from sparselab.widgets.working import WorkingPanel

_LOOK: dict[str, Any] = {"style": {"description_width": "8em"}, "layout": Layout(width="21em")}  # for the longest name


def view(out: Path) -> View:
    """What is kept in a folder so far: its first figure, and a row a run.

    Args:
        out: folder that collects results.

    Raises:
        ValueError: there are no results, or nothing varies that a figure could show.
    """
    runs = read_sweep(out)
    figure = next(found(runs), None)
    if figure is None:
        raise ValueError(
            f"{len(runs)} runs are kept in {out}; a figure shows more than one sparsity, damping or method"
        )
    shown = ["model", "method", "pattern", "percdamp", "nsamples", "seed", "perplexity", "relative_error", "seconds"]
    numbers = runs.assign(failure=runs.failure.replace("", None))[[*shown, "failure"]]
    numbers = numbers.dropna(axis="columns", how="all").round(4)
    return View(figure, numbers, f"{len(runs)} runs are kept in {out}, {len(failures(runs))} of them failed")


class SweepForm(WorkingPanel):
    """Fill in a grid; Dry run says what it takes, Run does what is missing in other processes, Cancel ends these.

    A field is left empty, which is the default of the parameter, or holds one value or several with commas between, as
    they would stand in `grid.yaml`: "50%, 60%, 2:4", or "'0=dense,*=60%'" in quotes, since there are commas in it.

    Args:
        grid: what the fields hold first, see `sparselab.grid.read_grid`.
        out: folder that collects results.
        workers: processes.
    """

    def __init__(self, grid: Mapping[str, Any], out: str | Path = "runs", workers: int = 1) -> None:
        read_grid(grid, out)
        self.out = Path(out)
        defaults = SweepRun(RunConfig(), TextConfig()).parameters
        self.fields = {
            name: Text(
                value=as_values(grid[name]) if name in grid else "",
                placeholder=as_values(defaults[name]) if name in defaults else "",
                description=name,
                continuous_update=False,
                **_LOOK,
            )
            for name in (*(name for name in RUN_PARAMETERS if name != "out"), EXCLUDE)
        }
        self.workers = BoundedIntText(value=workers, min=1, max=64, description="workers", **_LOOK)
        self.retry = Checkbox(description="do again what has failed", indent=False)
        self.plan_button = Button(
            description="Dry run", icon="list", tooltip="how many runs, how long, how much memory"
        )
        self.written = HTML()
        controls = [row(*self.fields.values(), self.workers), self.written, row(self.plan_button, self.retry)]
        super().__init__(controls, lambda: view(self.out), self._sweep, "runs")
        self.plan_button.on_click(lambda _: self.do(self._plan))
        for field in self.fields.values():
            field.observe(self._checked, "value")
        self.refresh()
        self._checked()

    @property
    def grid(self) -> dict[str, Any]:
        """What the fields hold.

        Raises:
            ParameterError: a field cannot be read.
        """
        filled = {name: field.value for name, field in self.fields.items() if field.value.strip()}
        return {name: read_values(name, text) for name, text in filled.items()}

    def _checked(self, *_: object) -> None:
        """Say at once what the fields come to."""
        try:
            self.say(str(read_grid(self.grid, self.out)))
            self.written.value = f"<pre>{html.escape(as_yaml(self.grid))}</pre>"
        except ParameterError as error:
            self.say(str(error), failed=True)

    def _engine(self) -> Callable[[], Pool]:
        """Processes of their own, so that the notebook answers meanwhile."""
        return partial(Pool, self.workers.value)

    def _sweep(self) -> Work:
        grid, engine, retry = read_grid(self.grid, self.out), self._engine(), self.retry.value

        def work(watch: Callable[[int, int], None]) -> str:
            runs = sweeps.sweep(grid.given, self.out, engine, retry=retry, progress=watch)
            return f"{len(runs)} runs in {self.out}, {len(failures(runs))} of them failed"

        return work

    def _plan(self) -> Work:
        grid, engine, retry = read_grid(self.grid, self.out), self._engine(), self.retry.value
        return lambda watch: str(sweeps.plan(grid.given, self.out, engine, retry=retry, progress=watch))
