"""The curve lab: perplexity against sparsity, more points at the press of a button, none computed twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ipywidgets import BoundedIntText, SelectMultiple

from sparselab.comparison import caption
from sparselab.experiment import RunConfig, Workbench
from sparselab.figures.seeds import curves, over_seeds
from sparselab.methods import METHODS, PUBLISHED, find
from sparselab.widgets.job import Work
from sparselab.widgets.panel import View, row
from sparselab.widgets.working import WorkingPanel

PATTERNS = (*(f"{percent}%" for percent in range(10, 100, 10)), "2:4", "4:8", "1:4")


@dataclass(frozen=True)
class State:
    """Where the controls stand.

    Args:
        methods, patterns: what to run, all with all.
        seeds: how many calibration draws, from seed 0 on; magnitude has no use for more than one.
    """

    methods: tuple[str, ...] = PUBLISHED
    patterns: tuple[str, ...] = PATTERNS
    seeds: int = 1

    def runs(self, like: RunConfig) -> list[RunConfig]:
        """The runs of this state, seed after seed; everything it does not say is as in `like`."""
        return [
            replace(like, method=method, sparsity=pattern, seed=seed)
            for seed in range(self.seeds)
            for pattern in self.patterns
            for method in self.methods
            if seed == 0 or find(method).needs != "nothing"
        ]


def view(bench: Workbench, like: RunConfig) -> View:
    """All finished runs of a bench as curves.

    Args:
        bench: whose runs are shown.
        like: the runs' common settings.

    Raises:
        ValueError: nothing is finished yet.
    """
    runs = bench.runs
    if runs.empty:
        raise ValueError("nothing is computed yet: choose what to run, and press Run")
    table = over_seeds(runs, "sparsity")
    seeds = tuple(sorted(int(seed) for seed in runs.seed.unique()))
    numbers = table.assign(perplexity=table["mean"].map("{:.2f}".format))
    numbers = numbers.pivot_table(index="pattern", columns="method", values="perplexity", aggfunc="first", sort=False)
    figure = curves(runs, "sparsity", caption(bench.name, bench.text, like.nsamples, seeds), dense=float(bench.dense))
    best = runs.sort_values("perplexity").iloc[0]
    summary = (
        f"{len(runs)} points; dense {float(bench.dense):.2f}, best {best.perplexity:.2f} ({best.method} {best.pattern})"
    )
    return View(figure, numbers.fillna("").reset_index(), summary)


class CurveLab(WorkingPanel):
    """Choose methods, sparsities and seeds; Run computes what is missing in the background, Cancel stops it.

    Only one of these may use a bench at a time, and nothing else may touch its model meanwhile.

    Args:
        bench: does the runs and remembers them.
        like: settings that all runs share.
        start: where the controls stand first.
    """

    def __init__(self, bench: Workbench, like: RunConfig, start: State | None = None) -> None:
        start = start or State()
        self.bench, self.like = bench, like
        self._current: RunConfig | None = None
        self.methods = SelectMultiple(
            options=list(METHODS), value=start.methods, description="methods", rows=len(METHODS)
        )
        self.patterns = SelectMultiple(options=PATTERNS, value=start.patterns, description="sparsities", rows=6)
        self.seeds = BoundedIntText(value=start.seeds, min=1, max=20, description="seeds")
        controls = [row(self.methods, self.patterns, self.seeds)]
        super().__init__(controls, lambda: view(bench, like), self._work, "points")
        self.refresh()

    @property
    def state(self) -> State:
        """The controls as they stand."""
        return State(tuple(self.methods.value), tuple(self.patterns.value), self.seeds.value)

    def _work(self) -> Work:
        """Compute what is missing; a run that is cancelled stops at its next layer."""
        runs = self.state.runs(self.like)
        if not runs:
            raise ValueError("choose at least one method and one sparsity")
        return lambda watch: self._compute(runs, watch)

    def _compute(self, runs: Sequence[RunConfig], watch: Callable[[int, int], None]) -> None:
        missing = [run for run in runs if self.bench.finished(run) is None]
        known = len(runs) - len(missing)
        watch(known, len(runs))
        for done, self._current in enumerate(missing, known):
            self.bench.run(self._current, lambda *_, done=done: watch(done, len(runs)))
            watch(done + 1, len(runs))

    def _under_way(self) -> str:
        run = self._current
        return f"running {run.method} {run.sparsity}, seed {run.seed}" if run else "running"
