"""Sweeps: every run of a grid, done once, by whoever is there to do it, and kept on disk as soon as it is finished."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil
from filelock import FileLock, Timeout

from sparselab import estimates, files
from sparselab.engines import Engine, Workers
from sparselab.errors import LostWorkerError, OutputError
from sparselab.experiment import FAILURE, RESULT, TextConfig, Workbench, keep_failure, run_folder
from sparselab.grid import Given, Grid, read_grid
from sparselab.manifest import machine_record
from sparselab.methods import find
from sparselab.models import load
from sparselab.parameters import SweepRun
from sparselab.progress import Progress, tracked
from sparselab.results import read_failure, read_runs

PARTIAL_NOTEBOOK, NOTEBOOK = "run.partial.ipynb", "run.ipynb"
ABOUT = "sweep.json"
_LOCK = ".lock"
_NO_WARNINGS = "--IPKernelApp.log_level=ERROR"  # of a kernel that talks to its own machine without encryption
_one_at_a_time = threading.Lock()  # a worker of several threads has one model all the same
_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_LOSSES = 3  # times in a row that processes may be lost without a single job having been finished


@dataclass(frozen=True)
class Job:
    """What a worker does in one go: one run, or several that share statistics.

    Args:
        runs: of one model on one text.
        identity: of these, see `Workbench`.
        template: the notebook that does each; None does without.
    """

    runs: tuple[SweepRun, ...]
    identity: dict[str, str]
    template: Path | None = None


class Survey(NamedTuple):
    """What a worker knows once a model and its text are open.

    Args:
        identity: see `Workbench`.
        seconds: of one window through the model.
        nbytes: memory of the worker.
        statistics: memory of the statistics of all layers.
    """

    identity: dict[str, str]
    seconds: float
    nbytes: int
    statistics: int


@dataclass(frozen=True)
class Plan:
    """What a sweep still has to do.

    Args:
        grid: what was asked for.
        folders: where each run is kept.
        failed: the errors of runs that have failed before, and are not to be done again.
        jobs: what is left.
        seconds: about how long one worker needs for that.
        nbytes: about the memory of a worker.
    """

    grid: Grid
    folders: dict[SweepRun, Path]
    failed: dict[SweepRun, str]
    jobs: tuple[Job, ...]
    seconds: float
    nbytes: int

    @property
    def todo(self) -> int:
        """Runs that are left."""
        return sum(len(job.runs) for job in self.jobs)

    def __str__(self) -> str:
        """For the screen."""
        said = [f"{len(self.folders) - self.todo - len(self.failed)} done", f"{self.todo} to do"]
        said += [f"{len(self.failed)} failed before, which --retry does again"] * bool(self.failed)
        text = f"{self.grid}: {', '.join(said)}"
        if not self.jobs:
            return text
        return (
            f"{text}; about {self.seconds / 60:.1f} minutes of one worker; {self.nbytes / 1e9:.1f} GB for each worker"
        )


def sweep(
    grid: Given,
    out: str | Path,
    executor: Engine | None = None,
    *,
    template: str | Path | None = None,
    retry: bool = False,
    progress: Progress = True,
    tell: Callable[[str], object] = lambda _: None,
    watch: Callable[[int, int], object] = lambda *_: None,
) -> pd.DataFrame:
    """Do every run of a grid that is not done yet.

    Each is kept in a folder of its own as soon as it is finished, named by a hash of its settings, model, texts and
    version. Whatever ends the sweep, the same call goes on with what is left; a run that fails stops no other.

    Runs with `propagate="dense"` that differ in method, pattern, damping or number of windows share the statistics of
    one pass, if they are done without notebooks.

    Args:
        grid: a YAML file or a mapping, see `read_grid`.
        out: folder that collects results; on a file system that all workers share.
        executor: does the runs: any `concurrent.futures.Executor` (of Dask, `client.get_executor()`), or a function
            that makes one, which is called again if its processes are lost; None does them in this process. Methods
            that were registered here are not known to other processes, unless what makes them registers these too.
        template: a notebook that papermill runs for each run and keeps beside its result: `notebooks/sweep_run.ipynb`,
            or one with the same parameters; None does without.
        retry: also do again what has failed before.
        progress: a bar over runs, see `sparselab.progress`; a function is also called now and then while workers are
            busy, so that what it raises ends the sweep at once.
        tell: called with a line about what is to be done, and about each run that has failed.
        watch: called with (runs done, runs in all that were to do) whenever there are new results in `out`.

    Returns:
        A row a run of the grid, done or failed; see `Result`.

    Raises:
        ParameterError: see `read_grid`.
        OutputError: another sweep writes to `out`, or a worker finds another model or text than this process.
        ModelLoadError, ValueError: a model or a text cannot be opened.
        LostWorkerError: processes end again and again.
    """
    with _opened(grid, out, executor, template) as (wanted, workers, notebook), _alone(Path(out)):
        planned = _planned(wanted, workers, notebook, retry)
        for line in (planned, *(f"{point}: {why}" for point, why in planned.failed.items())):
            tell(str(line))
        _say_what_it_is(planned, Path(out))
        with tracked(progress, planned.todo, "sweep", "run") as advance:
            done = 0
            for runs in _do_all(planned, workers, tell):
                advance(runs)
                if runs:
                    done += runs
                    watch(done, planned.todo)
    return read_runs(planned.folders.values())


def plan(
    grid: Given,
    out: str | Path,
    executor: Engine | None = None,
    *,
    template: str | Path | None = None,
    retry: bool = False,
) -> Plan:
    """What `sweep` would do: models and texts are opened and the dense ones measured, but nothing is pruned.

    Args, Raises: see `sweep`.
    """
    with _opened(grid, out, executor, template) as (wanted, workers, notebook):
        return _planned(wanted, workers, notebook, retry)


def survey(point: SweepRun) -> Survey:
    """Open a model and its text in a worker, and measure there what all runs need, unless it is kept already."""
    with _one_at_a_time:
        bench = _bench(*_shared(point))
        if "perplexity" in point.measure:
            float(bench.dense)
        seconds = estimates.seconds_per_window(bench.model, point.text.seqlen)
        statistics = estimates.statistics_nbytes(bench.model, bench.held_out)
    return Survey(bench.identity, seconds, psutil.Process().memory_info().rss, statistics)


def do(job: Job) -> None:
    """Do runs in a worker; each leaves its result, or its failure, on disk."""
    with _one_at_a_time:
        _do(job)


def _do(job: Job) -> None:
    waiting = [point for point in job.runs if not _done(_folder(job, point), job.template)]
    if not job.template and waiting:
        bench = _same_bench(job)
        if len(waiting) > 1:
            bench.collect(sorted({point.run.nsamples for point in waiting}), waiting[0].run.seed)
    for point in waiting:
        folder = _folder(job, point)
        try:
            if job.template:
                _in_notebook(job.template, folder, point)
            else:
                bench.run(point.run)
            (folder / FAILURE).unlink(missing_ok=True)
        except Exception as error:  # whatever it is, the other runs go on
            keep_failure(folder, job.identity, point.text, point.run, error)
    if not job.template and waiting:
        bench.forget_collected()


@lru_cache(maxsize=1)
def _bench(model: str, text: TextConfig, measure: str, out: Path) -> Workbench:
    """The one that this process was asked for last."""
    return Workbench(*load(model), model, text, out, measure)


def _shared(point: SweepRun) -> tuple[str, TextConfig, str, Path]:
    """What runs of one workbench have in common."""
    return point.model, point.text, point.measure, point.out


def _same_bench(job: Job) -> Workbench:
    """Of the job's model and text, which have to be those that the sweep speaks of."""
    first = job.runs[0]
    bench = _bench(*_shared(first))
    if differing := [name for name, value in bench.identity.items() if job.identity[name] != value]:
        raise OutputError(
            f"{first.model}: {differing[0]} is another in this worker than where the sweep was planned; give "
            "all workers the same files, Python and packages"
        )
    return bench


def _in_notebook(template: Path, folder: Path, point: SweepRun) -> None:
    """Run the notebook, which keeps the result; what it has come to can be looked at meanwhile."""
    import papermill

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL_NOTEBOOK
    try:
        papermill.execute_notebook(
            template, partial, point.parameters, progress_bar=False, extra_arguments=[_NO_WARNINGS]
        )
    except papermill.exceptions.PapermillExecutionError as error:
        raise RuntimeError(f"{error.ename}: {error.evalue}") from None  # its own text is the whole cell in colours
    if not (folder / RESULT).is_file():
        raise OutputError(f"{template}: expected to keep {folder / RESULT}, which is not there; see {partial}")
    partial.replace(folder / NOTEBOOK)


@contextmanager
def _opened(
    grid: Given, out: str | Path, executor: Engine | None, template: str | Path | None
) -> Iterator[tuple[Grid, Workers, Path | None]]:
    """Arguments, once they are checked; in the end nothing of what was made for them is left."""
    notebook = None if template is None else Path(template).resolve()
    if notebook is not None and not notebook.is_file():
        raise ValueError(f"template: expected a notebook, received {template}, which is not there")
    workers = Workers(executor)
    try:
        yield read_grid(grid, Path(out).resolve()), workers, notebook
    except BaseException:
        workers.stop(at_once=True)
        raise
    else:
        workers.stop()
    finally:
        _bench.cache_clear()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One sweep at a time writes to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / _LOCK).acquire(timeout=0):
            yield
    except Timeout:
        raise OutputError(f"{out}: another sweep writes to it; wait, or choose another --out") from None


def _planned(grid: Grid, workers: Workers, template: Path | None, retry: bool) -> Plan:
    """Ask a worker about each model on each text, and look on disk."""
    folders: dict[SweepRun, Path] = {}
    failed: dict[SweepRun, str] = {}
    jobs: list[Job] = []
    seconds, nbytes = 0.0, 0
    for points in _grouped(grid.runs):
        known = workers.submit(survey, points[0]).result()
        here = {point: run_folder(point.out, known.identity, point.text, point.run) for point in points}
        waiting = [point for point, folder in here.items() if not _done(folder, template)]
        errors = {} if retry else {point: read_failure(here[point]) for point in waiting}
        failed |= {point: error for point, error in errors.items() if error}
        todo = [point for point in waiting if point not in failed]
        folders |= here
        for some in _sharing(todo, template):
            jobs.append(Job(tuple(some), known.identity, template))
            runs, shared = [point.run for point in some], len(some) > 1
            seconds += known.seconds * estimates.windows_passed(
                runs, points[0].text.eval_nsamples, points[0].measure, shared
            )
            held = ("errors" in points[0].measure) + shared * len({run.nsamples for run in runs})
            nbytes = max(nbytes, known.nbytes + held * known.statistics)
    return Plan(grid, folders, failed, tuple(jobs), seconds, nbytes)


def _grouped(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Those of one workbench together."""
    groups: dict[object, list[SweepRun]] = {}
    for point in runs:
        groups.setdefault(_shared(point), []).append(point)
    return list(groups.values())


def _sharing(points: Sequence[SweepRun], template: Path | None) -> list[list[SweepRun]]:
    """Those that share statistics together: of the dense model, on windows of one draw."""
    groups: dict[object, list[SweepRun]] = {}
    for point in points:
        run = point.run
        shares = template is None and run.propagate == "dense" and find(run.method).needs != "nothing"
        groups.setdefault(run.seed if shares else point, []).append(point)
    return list(groups.values())


def _say_what_it_is(planned: Plan, out: Path) -> None:
    """Beside the results: the grid as it was given, and where the sweep is led from."""
    about = (
        {"grid": planned.grid.given, "runs": len(planned.folders)} | files.versions() | {"machine": machine_record()}
    )
    files.write_text(out / ABOUT, json.dumps(about, indent=1, default=str) + "\n")


def _do_all(planned: Plan, workers: Workers, tell: Callable[[str], object]) -> Iterator[int]:
    """Have all jobs done, those of lost processes once more; gives the runs of each that is done, or 0 meanwhile."""
    waiting, losses = list(planned.jobs), 0
    while waiting:
        lost: list[Job] = []
        for job, future in _as_done(waiting, workers):
            if future is None:
                yield 0
                continue
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                lost.append(job)
                continue
            for point in job.runs:
                folder = planned.folders[point]
                if error and not _done(folder, job.template):
                    keep_failure(folder, job.identity, point.text, point.run, error)
                if why := read_failure(folder):
                    tell(f"{point}: {why}")
            yield len(job.runs)
        losses = 0 if len(lost) < len(waiting) else losses + 1
        if lost and (losses == _MOST_LOSSES or not workers.renewable):
            raise LostWorkerError(_about_losses(lost))
        if lost:
            workers.stop(at_once=True)
        waiting = lost


def _as_done(jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[Job, "Future[None] | None"]]:
    """Each job when it is finished, in whatever order, and now and then one that is not, without its future.

    This process does jobs as they are submitted.
    """
    under_way: dict[Future[None], Job] = {}
    for job in jobs:
        future = workers.submit(do, job)
        if future.done():
            yield job, future
        else:
            under_way[future] = job
    while under_way:
        finished, _ = wait(under_way, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        for future in finished:
            yield under_way.pop(future), future
        if not finished:
            yield next(iter(under_way.values())), None


def _about_losses(lost: Sequence[Job]) -> str:
    runs = sum(len(job.runs) for job in lost)
    return (
        f"processes have ended before they were done, as when memory is short; {runs} runs are left, of which "
        f"{lost[0].runs[0]} was under way or next. Take fewer workers, or leave that run out; the same command goes on"
    )


def _folder(job: Job, point: SweepRun) -> Path:
    return run_folder(point.out, job.identity, point.text, point.run)


def _done(folder: Path, template: Path | None) -> bool:
    return (folder / RESULT).is_file() and (template is None or (folder / NOTEBOOK).is_file())
