"""The curve lab: perplexity against sparsity, more points at the press of a button, none computed twice."""

from dataclasses import dataclass, replace

from ipywidgets import BoundedIntText, Button, FloatProgress, SelectMultiple

from sparselab.comparison import caption
from sparselab.experiment import RunConfig, Workbench
from sparselab.figures.seeds import curves, over_seeds
from sparselab.methods import METHODS, PUBLISHED, find
from sparselab.widgets.job import Job
from sparselab.widgets.panel import Panel, View, row

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


class CurveLab(Panel):
    """Choose methods, sparsities and seeds; Run computes what is missing in the background, Cancel stops it.

    Args:
        bench: does the runs and remembers them.
        like: settings that all runs share.
        start: where the controls stand first.
    """

    def __init__(self, bench: Workbench, like: RunConfig, start: State | None = None) -> None:
        start = start or State()
        self.bench, self.like = bench, like
        self.job: Job | None = None
        self.methods = SelectMultiple(
            options=list(METHODS), value=start.methods, description="methods", rows=len(METHODS)
        )
        self.patterns = SelectMultiple(options=PATTERNS, value=start.patterns, description="sparsities", rows=6)
        self.seeds = BoundedIntText(value=start.seeds, min=1, max=20, description="seeds")
        self.run_button = Button(description="Run", icon="play", button_style="primary")
        self.cancel_button = Button(description="Cancel", icon="stop", disabled=True)
        self.progress = FloatProgress(value=0, min=0, max=1, description="")
        self._drawn = 0
        rows = [row(self.methods, self.patterns, self.seeds), row(self.run_button, self.cancel_button, self.progress)]
        super().__init__(rows, lambda: view(bench, like))
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())
        self.refresh()

    @property
    def state(self) -> State:
        """The controls as they stand."""
        return State(tuple(self.methods.value), tuple(self.patterns.value), self.seeds.value)

    def start(self) -> None:
        """Compute what is missing, in the background."""
        if self.job is not None and self.job.state == "running":
            return
        runs = self.state.runs(self.like)
        if not runs:
            self.say("choose at least one method and one sparsity", failed=True)
            return
        self.job = Job(self.bench, runs, self._news)
        self.run_button.disabled, self.cancel_button.disabled = True, False
        self.say(f"running: 0 of {len(runs)} points")
        self.job.start()

    def cancel(self) -> None:
        """Stop at the next layer; finished points stay."""
        if self.job is not None:
            self.job.cancel()

    def _news(self, job: Job) -> None:
        self.progress.value = job.finished / job.total
        known = len(self.bench.runs)
        if known != self._drawn:
            self._drawn = known
            self.refresh()
        if job.state != "running":
            self.run_button.disabled, self.cancel_button.disabled = False, True
        self.say(_words(job), failed=job.state == "failed")


def _words(job: Job) -> str:
    points = f"{job.finished} of {job.total} points"
    if job.state == "failed":
        return f"failed after {points}: {job.error}"
    if job.state != "running" or job.current is None:
        return f"{job.state}: {points}" + (", all kept" if job.state == "cancelled" else "")
    left = "" if job.seconds_left is None else f", about {_duration(job.seconds_left)} left"
    return f"running {job.current.method} {job.current.sparsity}, seed {job.current.seed}: {points}{left}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
