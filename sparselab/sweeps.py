"""Sweeps: every run of a grid, done once, by whoever is there to do it, and kept on disk as soon as it is finished."""

import json
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from sparselab import estimates, files
from sparselab.engines import Engine, Workers
from sparselab.errors import LostWorkerError, OutputError
from sparselab.experiment import FAILURE, keep_failure, run_folder
from sparselab.grid import Given, Grid, read_grid
from sparselab.manifest import machine_record
from sparselab.methods import find
from sparselab.parameters import SweepRun
from sparselab.progress import Progress, tracked
from sparselab.results import read_failure, read_runs
from sparselab.worker import Job, Survey, do, forget, in_common, is_done, survey

ABOUT = "sweep.json"
_LOCK = ".lock"
_SECONDS_BETWEEN_LOOKS = 0.5
_NOTEBOOK_SECONDS = 20  # for a kernel to begin and to open model and texts, as measured on two CPU cores
_MOST_LOSSES = 3  # of processes that are to open a model


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
        return sum(len(job.folders) for job in self.jobs)

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
    version. Whatever ends the sweep, the same call goes on with what is left; a run that fails stops no other, nor
    does one that ends its process, if this is one that `executor` makes.

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
        progress: a bar over runs, see `sparselab.progress`; a function is also called now and then while other
            processes are busy, with (0, 0) as long as it is not known what is to be done, so that what it raises ends
            the sweep at once.
        tell: called with a line about what is to be done, and about each run that has failed.
        watch: called with (runs done, runs in all that were to do) before the first, and whenever there are new
            results in `out`.

    Returns:
        A row a run of the grid, done or failed; see `Result`.

    Raises:
        ParameterError: see `read_grid`.
        OutputError: another sweep writes to `out`.
        ModelLoadError, ValueError: a model or a text cannot be opened.
        LostWorkerError: an executor has lost its processes, and it is not known how to make another.
    """
    with _opened(grid, out, executor, template) as (wanted, workers, notebook), _alone(Path(out)):
        planned = _planned(wanted, workers, notebook, retry, progress)
        for line in (planned, *(f"{point}: {why}" for point, why in planned.failed.items())):
            tell(str(line))
        _say_what_it_is(planned, Path(out))
        _forget_failures(planned)
        watch(0, planned.todo)
        with (
            tracked(progress, planned.todo, "sweep", "run") as advance,
            closing(_do_all(planned, workers, tell)) as ended,
        ):
            done = 0
            for runs in ended:
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
    progress: Progress = False,
) -> Plan:
    """What `sweep` would do: models and texts are opened and the dense ones measured, but nothing is pruned.

    Args, Raises: see `sweep`.
    """
    with _opened(grid, out, executor, template) as (wanted, workers, notebook):
        return _planned(wanted, workers, notebook, retry, progress)


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
        forget()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One sweep at a time writes to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / _LOCK).acquire(timeout=0):
            yield
    except Timeout:
        raise OutputError(f"{out}: another sweep writes to it; wait, or choose another --out") from None


def _planned(grid: Grid, workers: Workers, template: Path | None, retry: bool, progress: Progress) -> Plan:
    """Ask a worker about each model on each text, and look on disk."""
    sweep = uuid.uuid4().hex
    folders: dict[SweepRun, Path] = {}
    failed: dict[SweepRun, str] = {}
    jobs: list[Job] = []
    seconds, nbytes = 0.0, 0
    for points in _grouped(grid.runs):
        known = _surveyed(workers, sweep, points[0], progress)
        here = {point: run_folder(point.out, known.identity, point.text, point.run) for point in points}
        waiting = [point for point, folder in here.items() if not is_done(folder, template)]
        errors = {} if retry else {point: read_failure(here[point]) for point in waiting}
        failed |= {point: error for point, error in errors.items() if error}
        todo = [point for point in waiting if point not in failed]
        folders |= here
        for some in _sharing(todo, template):
            jobs.append(Job(sweep, {point: here[point] for point in some}, known.identity, template))
            runs, shared = [point.run for point in some], len(some) > 1
            seconds += known.seconds * estimates.windows_passed(
                runs, points[0].text.eval_nsamples, points[0].measure, shared
            )
            seconds += _NOTEBOOK_SECONDS if template else 0
            held = ("errors" in points[0].measure) + shared * len({run.nsamples for run in runs})
            nbytes = max(nbytes, known.nbytes + held * known.statistics)
    return Plan(grid, folders, failed, tuple(jobs), seconds, nbytes)


def _surveyed(workers: Workers, sweep: str, point: SweepRun, progress: Progress) -> Survey:
    """Ask a worker, and another one if the first is lost."""
    for _ in range(_MOST_LOSSES):
        asked = workers.submit(survey, sweep, point)
        try:
            while not wait([asked], _SECONDS_BETWEEN_LOOKS).done:
                if callable(progress):
                    progress(0, 0)
        finally:
            workers.give_up([asked])
        if not isinstance(asked.exception(), BrokenExecutor):
            return asked.result()
        if not workers.renewable:
            break
        workers.stop(at_once=True)
    raise LostWorkerError(f"{point.model}: the process that was to open it has ended, as when memory is short")


def _grouped(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Those of one workbench together."""
    groups: dict[object, list[SweepRun]] = {}
    for point in runs:
        groups.setdefault(in_common(point), []).append(point)
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


def _forget_failures(planned: Plan) -> None:
    """Of runs that are done again."""
    for job in planned.jobs:
        for folder in job.folders.values():
            (folder / FAILURE).unlink(missing_ok=True)


def _do_all(planned: Plan, workers: Workers, tell: Callable[[str], object]) -> Generator[int, None, None]:
    """Have all jobs done; gives the runs of each that has come to an end, or 0 meanwhile.

    Jobs of lost processes are done again: together, as long as some of them are finished, then one at a time. One of
    several runs that loses its process alone is taken apart; a run that does has failed.
    """
    waiting, alone = list(planned.jobs), False
    while waiting:
        tried, waiting = (waiting[:1], waiting[1:]) if alone else (waiting, [])
        lost: list[Job] = []
        for job, error in _as_done(tried, workers):
            if job is None:
                yield 0
            elif isinstance(error, BrokenExecutor) and job.left:
                lost.append(job)
            else:
                yield _settled(job, error, tell)
        if lost and not workers.renewable:
            raise LostWorkerError(_about_losses(lost))
        if lost:
            workers.stop(at_once=True)
        if lost and alone:
            [job] = lost
            if len(job.folders) == 1:
                lost = []
                yield _settled(job, LostWorkerError("its process has ended twice, as when memory is short"), tell)
            else:
                lost = [replace(job, folders={point: folder}) for point, folder in job.folders.items()]
            alone = False
        else:
            alone = len(lost) == len(tried)
        waiting = [*waiting, *lost]


def _as_done(jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[Job | None, BaseException | None]]:
    """Each job when it has come to an end, with what it raised, in whatever order; and no job now and then meanwhile.

    This process does jobs as they are submitted. Those that nobody waits for any more are not begun.
    """
    under_way: dict[Future[None], Job] = {}
    try:
        for job in jobs:
            future = workers.submit(do, job)
            if future.done():
                yield job, future.exception()
            else:
                under_way[future] = job
        while under_way:
            finished, _ = wait(under_way, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in finished:
                yield under_way.pop(future), future.exception()
            if not finished:
                yield None, None
    finally:
        workers.give_up(under_way)


def _settled(job: Job, error: BaseException | None, tell: Callable[[str], object]) -> int:
    """Keep and tell what has failed of a job that has come to an end; its number of runs."""
    left = job.left
    for point, folder in job.folders.items():
        if error and point in left:
            keep_failure(folder, job.identity, point.text, point.run, error)
        if why := read_failure(folder):
            tell(f"{point}: {why}")
    return len(job.folders)


def _about_losses(lost: Sequence[Job]) -> str:
    left = [point for job in lost for point in job.left]
    return (
        f"processes have ended before they were done, as when memory is short; {len(left)} runs are left, as "
        f"{left[0]}. Take fewer workers, or leave such runs out; the same call goes on"
    )
