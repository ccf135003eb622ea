"""A folder of submissions graded by nbgrader: points, reasons and feedback, whatever was handed in."""

import hashlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.api import Gradebook
from nbgrader.preprocessors import LimitOutput, SaveAutoGrades
from tqdm.auto import tqdm

from sparselab import __version__, files
from sparselab.course import answers
from sparselab.course.grader.execution import REMARKS, GradedExecution
from sparselab.course.grader.grades import write_grades
from sparselab.course.grader.handout import check_problem_set, database, done, extras, handed_out, nbgrader, release
from sparselab.course.grader.submission import Submission, assembled, find_submissions
from sparselab.errors import OutputError
from sparselab.journal import Journal


@dataclass(frozen=True)
class Limits:
    """How long a student's notebook may take, and how much memory.

    Args:
        cell_seconds: for one cell; then it is interrupted.
        seconds: for all cells; then the notebook is ended.
        memory_gb: for its process, in 10⁹ bytes; only Linux can limit it.
    """

    cell_seconds: int = 120
    seconds: int = 600
    memory_gb: float = 6.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a number above 0, received {value}")


@dataclass(frozen=True)
class Task:
    """What a process that grades one submission is told: where to work, where hidden checks and measurements lie."""

    root: Path
    instructor: Path
    problem_set: str
    submission: Submission
    limits: Limits
    cache: Path


def grade(
    course: Path,
    problem_set: str,
    submissions: Path,
    out: Path,
    limits: Limits | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    resume: bool = False,
) -> list[str]:
    """Grade every submission in a folder.

    Each is put into the notebook that was handed out, and run by nbgrader. `out` becomes a course folder of nbgrader's
    with a new gradebook, the table of `write_grades`, and `feedback/NAME/ps1/ps1.html`. Students who have been graded
    stay so when the work is interrupted.

    Args:
        course: folder with `source/` and `instructor/`.
        problem_set: a folder of `source/`, say "ps1".
        submissions: see `find_submissions`.
        out: an absent or empty folder.
        limits: of time and memory, for each student.
        workers: students graded at a time.
        overwrite: replace an earlier result, unless points have been given by hand in it.
        resume: go on where an interrupted run of the same work has stopped.

    Returns:
        Names of students who could not be graded, if there are any: they have no points, and the table says why.

    Raises:
        ValueError: no such problem set, no submissions, or an argument makes no sense.
        OutputError: see `files.check_output`; or points were given by hand in what would be replaced.
        CourseError: nbgrader refuses the source.
    """
    check_problem_set(course, problem_set)
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, received {workers}")
    limits = limits or Limits()
    found = find_submissions(submissions, problem_set, **extras(course, problem_set))
    _check_not_by_hand(out)
    work = {"problem_set": problem_set, "submissions": str(submissions.resolve()), "limits": asdict(limits)}
    work |= {"checks": _digest(course, problem_set), "version": __version__}
    with files.resumable_output(out, overwrite, [course, submissions]) as root:
        journal = Journal(root / files.JOURNAL, work, resume)
        if not journal.entries:
            files.clear(root, [])
            release(course, problem_set, root)
        _prepare(problem_set)
        graded = {entry["key"] for entry in journal.entries}
        shared = (root, course / "instructor", problem_set)
        waiting = [Task(*shared, each, limits, files.cache_folder()) for each in found if each.key not in graded]
        _grade_all(waiting, workers, journal)
        write_grades(root)
        files.write_stamp(root, "grade", work)
        return [entry["name"] for entry in journal.entries if entry["problem"]]


def _digest(course: Path, problem_set: str) -> str:
    """Of all that decides on points: the problem set and its checks."""
    paths = [course / "source" / problem_set / f"{problem_set}.ipynb", course / "instructor" / "hidden.py"]
    paths += sorted(Path(answers.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _prepare(problem_set: str) -> None:
    """Have the checks measure now what they would else measure for each student."""
    prepare = getattr(importlib.import_module(f"sparselab.course.{problem_set}"), "prepare", None)
    if prepare is not None:
        prepare()


def _grade_all(tasks: list[Task], workers: int, journal: Journal) -> None:
    """All submissions; those with which something went wrong are tried once more, each by itself."""

    def note(task: Task, problem: str) -> None:
        journal.append({"key": task.submission.key, "name": task.submission.student, "problem": problem})
        bar.update()

    with tqdm(total=len(tasks), unit="student") as bar:
        again = []
        for task, problem in _grade_at_once(tasks, workers):
            if problem:
                again.append(task)
            else:
                note(task, "")
        for task in again:
            note(*next(_grade_at_once([task], 1)))


def _grade_at_once(tasks: list[Task], workers: int) -> Iterator[tuple[Task, str]]:
    """Tasks and what went wrong, as they end, in processes of their own: nbgrader changes the current folder."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _share_the_machine, (workers,)) as pool:
        running = {pool.submit(_grade_one, task): task for task in tasks}
        try:
            for future in as_completed(running):
                try:
                    yield running[future], future.result()
                except BrokenProcessPool:
                    yield running[future], "could not be graded: the process that graded it was ended"
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _share_the_machine(workers: int) -> None:
    """Settings that the notebooks of a worker inherit."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    silence = os.open(os.devnull, os.O_WRONLY)  # what a notebook writes there belongs to no cell
    os.dup2(silence, sys.stderr.fileno())
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


def _grade_one(task: Task) -> str:
    """Grade one submission, and write its feedback.

    Returns:
        Why it could not be graded; empty if it was.
    """
    key, problem_set = task.submission.key, task.problem_set
    # What a student's code leaves in this folder does not meet the next one; a process it left may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        try:
            warnings.simplefilter("ignore")  # nbgrader's own
            api = nbgrader(task.root, **_settings(task, Path(own)))
            _lay_out(task)
            done(api.autograde(problem_set, key), task.submission.student)
            done(api.generate_feedback(problem_set, key), task.submission.student)
        except Exception as error:  # one student's trouble must not be that of the others
            return f"could not be graded: {type(error).__name__}: {error}"
    return ""


def _settings(task: Task, own: Path) -> dict[str, dict[str, Any]]:
    """What nbgrader has to know to run a notebook, and a folder for what belongs to this run alone."""
    checks = own / "checks"
    checks.mkdir()
    shutil.copy(task.instructor / "hidden.py", checks)
    if task.cache.is_dir():
        shutil.copytree(task.cache, own / "cache")
    os.environ |= {"IPYTHONDIR": str(own / "ipython"), "SPARSELAB_CACHE": str(own / "cache")}
    execution = {
        "timeout": task.limits.cell_seconds,
        "seconds": task.limits.seconds,
        "memory": round(1e9 * task.limits.memory_gb),
        "instructor": str(checks.resolve()),
    }
    steps = [GradedExecution, LimitOutput, SaveAutoGrades]
    return {"Autograde": {"autograde_preprocessors": steps}, "GradedExecution": execution}


def _lay_out(task: Task) -> None:
    """Put a submission where nbgrader looks for it, in the form that was handed out; other files are left aside."""
    submission, problem_set = task.submission, task.problem_set
    folder = task.root / "submitted" / submission.key / problem_set
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notebook, remarks = assembled(handed_out(task.root, problem_set), submission.notebook)
    notebook.metadata[REMARKS] = [*submission.remarks, *remarks]
    nbformat.write(notebook, folder / f"{problem_set}.ipynb")
    for name, path in submission.others.items():
        shutil.copy(path, folder / name)


def _check_not_by_hand(out: Path) -> None:
    """What a person has given is not replaced."""
    stamp = files.read_stamp(out)
    if stamp is None or stamp["command"] != "grade" or not database(out).is_file():
        return
    with Gradebook(f"sqlite:///{database(out)}") as book:
        problem_set = stamp["settings"]["problem_set"]
        given = [each for each in book.assignment_submissions(problem_set) for each in each.notebooks]
        scores = [score for notebook in given for score in notebook.grades]
        comments = [comment.manual_comment for notebook in given for comment in notebook.comments]
        if any(comments) or any(score.manual_score is not None or score.extra_credit for score in scores):
            raise OutputError(f"{out}: holds points or comments given by hand; move it, or choose another --out")
