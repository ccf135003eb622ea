"""What a worker does for a sweep: it says what a model and its text are, and does runs, each kept on disk."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from sparselab import estimates
from sparselab.errors import OutputError
from sparselab.experiment import FAILURE, RESULT, TextConfig, Workbench, keep_failure
from sparselab.models import load
from sparselab.parameters import SweepRun

PARTIAL_NOTEBOOK, NOTEBOOK = "run.partial.ipynb", "run.ipynb"
_NO_WARNINGS = "--IPKernelApp.log_level=ERROR"  # of a kernel that talks to its own machine without encryption
_opened: dict[object, Workbench] = {}
_one_at_a_time = threading.Lock()  # a worker of several threads has one model all the same


@dataclass(frozen=True)
class Job:
    """What a worker does in one go: one run, or several that share statistics.

    Args:
        sweep: which sweep it is for; what a worker has open belongs to one.
        folders: the runs, of one model on one text, and where each is kept.
        identity: of these, see `Workbench`.
        template: the notebook that does each; None does without.
    """

    sweep: str
    folders: Mapping[SweepRun, Path]
    identity: dict[str, str]
    template: Path | None = None

    @property
    def left(self) -> dict[SweepRun, Path]:
        """Runs that are neither done yet nor have failed."""
        return {
            point: folder
            for point, folder in self.folders.items()
            if not is_done(folder, self.template) and not (folder / FAILURE).is_file()
        }


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


def survey(sweep: str, point: SweepRun) -> Survey:
    """Open a model and its text in a worker, and measure there what all runs need, unless it is kept already."""
    with _one_at_a_time:
        bench = workbench(sweep, point)
        if "perplexity" in point.measure:
            float(bench.dense)
        seconds = estimates.seconds_per_window(bench.model, point.text.seqlen)
        statistics = estimates.statistics_nbytes(bench.model, bench.held_out)
    return Survey(bench.identity, seconds, psutil.Process().memory_info().rss, statistics)


def do(job: Job) -> None:
    """Do runs in a worker; each leaves its result, or its failure, on disk.

    Raises:
        OutputError: model or text are others than where the sweep was planned.
    """
    with _one_at_a_time:
        if not (left := job.left):
            return
        bench = None if job.template else _same_workbench(job)
        try:
            if bench and len(left) > 1:
                with suppress(Exception):  # one run asks for what cannot be had: then each collects its own
                    bench.collect(sorted({point.run.nsamples for point in left}), next(iter(left)).run.seed)
            for point, folder in left.items():
                _do(job, point, folder, bench)
        finally:
            if bench:
                bench.forget_collected()


def is_done(folder: Path, template: Path | None) -> bool:
    """Whether a run has its result, and its notebook if one is asked for."""
    return (folder / RESULT).is_file() and (template is None or (folder / NOTEBOOK).is_file())


def in_common(point: SweepRun) -> tuple[str, TextConfig, str, Path]:
    """What runs of one workbench have in common."""
    return point.model, point.text, point.measure, point.out


def workbench(sweep: str, point: SweepRun) -> Workbench:
    """The one that this process was asked for last; for another sweep it is opened again, as files may be others."""
    wanted = sweep, *in_common(point)
    if wanted not in _opened:
        _opened.clear()  # one model at a time
        _opened[wanted] = Workbench(*load(point.model), point.model, point.text, point.out, point.measure)
    return _opened[wanted]


def forget() -> None:
    """Let go of the model that is open in this process."""
    _opened.clear()


def _same_workbench(job: Job) -> Workbench:
    """Of the job's model and text, which have to be those that the sweep speaks of."""
    first = next(iter(job.folders))
    bench = workbench(job.sweep, first)
    if differing := [name for name, value in bench.identity.items() if job.identity[name] != value]:
        raise OutputError(
            f"{first.model}: {differing[0]} is another in this worker than where the sweep was planned; give "
            "all workers the same files, Python and packages"
        )
    return bench


def _do(job: Job, point: SweepRun, folder: Path, bench: Workbench | None) -> None:
    try:
        if job.template:
            _in_notebook(job.template, folder, point)
        elif bench:
            bench.run(point.run)
    except Exception as error:  # whatever it is, the other runs go on
        keep_failure(folder, job.identity, point.text, point.run, error)


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
