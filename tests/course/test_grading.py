"""A teacher's day: the student version is made, a class hands in what classes hand in, and the grader copes."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile
import nbformat
import pytest
from handed_in import answered, as_typed, hand_in, reference, released, right_and_wrong, tables
from problem_sets import COURSE, EXERCISES, INSTRUCTOR, SOURCES, WRONG

from sparselab.course.grader.grades import renew
from sparselab.course.grader.grading import Limits, grade
from sparselab.course.grader.handout import make_assignment
from sparselab.course.grader.submission import exercises

nbgrader_api = pytest.importorskip("nbgrader.api")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

PROBLEM_SETS = [path.stem for path in SOURCES]
RIGHT_STYLES = ("right-1", "right-2")


class Graded:
    """A graded folder, looked at as a teacher would."""

    def __init__(self, root: Path, problem_set: str, rows: list[dict[str, str]]) -> None:
        self.root, self.problem_set = root, problem_set
        self.rows = {row["student"]: row for row in rows}

    def points(self, student: str) -> dict[str, float]:
        """By cell, out of nbgrader's gradebook."""
        with nbgrader_api.Gradebook(f"sqlite:///{self.root / 'gradebook.db'}") as book:
            notebook = book.find_submission_notebook(self.problem_set, self.problem_set, student)
            return {score.name: score.score for score in notebook.grades}

    def notebook(self, student: str) -> nbformat.NotebookNode:
        path = self.root / "autograded" / student / self.problem_set / f"{self.problem_set}.ipynb"
        return nbformat.read(path, as_version=4)

    def feedback(self, student: str) -> str:
        return (self.root / "feedback" / student / self.problem_set / f"{self.problem_set}.html").read_text()


def graded(folder: Path, out: Path, problem_set: str, cell_seconds: int, seconds: int) -> Graded:
    limits = Limits(cell_seconds, seconds, memory_gb=4)
    assert grade(COURSE, problem_set, folder, out, limits, workers=2) == []
    with (out / "grades.csv").open(newline="") as file:
        return Graded(out, problem_set, list(csv.DictReader(file)))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Folder of the student version of a problem set."""
    made: dict[str, Path] = {}

    def make(problem_set: str) -> Path:
        if problem_set not in made:
            made[problem_set] = tmp_path_factory.mktemp("release") / problem_set
            make_assignment(COURSE, problem_set, made[problem_set])
        return made[problem_set]

    return make


@pytest.fixture(scope="module", params=PROBLEM_SETS)
def a_class(request, release, sweep, tmp_path_factory):
    """The reference, a blank notebook, right answers and all wrong ones of a problem set, graded."""
    problem_set, folder = request.param, tmp_path_factory.mktemp("class")
    blank = released(release(problem_set), problem_set)
    hand_in(folder, "blank", blank, problem_set)
    true = {"results_csv": sweep.to_csv(index=False)} if tables(problem_set) else {}
    hand_in(folder, "reference", answered(blank, reference(problem_set)), problem_set, **true)
    answers, altered = right_and_wrong(problem_set), tables(problem_set)
    for name in dict.fromkeys([*answers, *altered]):
        if name.startswith("wrong") or name in RIGHT_STYLES:
            typed = {f"{exercise}-answer": as_typed(given) for exercise, given in answers.get(name, {}).items()}
            csv = {"results_csv": altered[name](sweep.copy()).to_csv(index=False)} if name in altered else {}
            hand_in(folder, name, answered(blank, typed), problem_set, **csv)
    return graded(folder, tmp_path_factory.mktemp("graded") / "out", problem_set, 200, 600)


def most(problem_set: str) -> dict[str, float]:
    source = nbformat.read(COURSE / "source" / problem_set / f"{problem_set}.ipynb", as_version=4)
    return {cell.id: cell.metadata.nbgrader.points for _, cell in exercises(source)}


def test_what_is_right_gets_all_points_and_a_blank_notebook_none(a_class):
    full = {cell: points for cell, points in most(a_class.problem_set).items() if cell != "question-answer"}
    for student in ("reference", *RIGHT_STYLES):
        assert a_class.points(student) == full | {"question-answer": 0}, a_class.rows[student]["reasons"]
    assert set(a_class.points("blank").values()) == {0}
    assert a_class.rows["reference"]["reasons"] == ""


def test_every_mutant_is_killed(a_class):
    killed = 0
    for student, answers in right_and_wrong(a_class.problem_set).items():
        if student.startswith("wrong"):
            points = a_class.points(student)
            for exercise, given in answers.items():
                assert points[f"{exercise}-visible"] == points[f"{exercise}-hidden"] == 0, given
                assert f"{exercise} raised NameError" not in a_class.rows[student]["reasons"]
                killed += 1
    assert killed == sum(given.problem_set == a_class.problem_set for given in WRONG) > 0


def test_every_table_that_is_wrong_is_refused(a_class):
    for student in tables(a_class.problem_set):
        if student.startswith("wrong"):
            points = a_class.points(student)
            assert points["results-visible"] == points["results-hidden"] == 0, a_class.rows[student]["reasons"]
            assert "results" in a_class.rows[student]["reasons"]


def test_blank_stubs_fail_visibly_and_helpfully(a_class):
    errors = {
        cell.id: output
        for cell in a_class.notebook("blank").cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }
    for problem_set, exercise in EXERCISES:
        if problem_set == a_class.problem_set:
            error = errors.pop(f"{exercise}-visible")
            assert (error.ename, error.evalue) == ("CheckError", f"{exercise} is not written yet")
            assert errors.pop(f"{exercise}-hidden").evalue == f"{exercise}: a hidden check fails"
            assert f"{exercise} is not written yet" in a_class.rows["blank"]["reasons"]
    assert not [cell for cell in errors if not cell.startswith("results")]


def test_feedback_tells_nothing_of_the_hidden_checks(a_class):
    lines = [line.strip() for line in (INSTRUCTOR / "hidden.py").read_text().splitlines()]
    for student in a_class.rows:
        page = a_class.feedback(student)
        assert not [line for line in lines if len(line) > 30 and line in page]
        assert "HIDDEN" not in page
        assert str(INSTRUCTOR) not in page
        assert "checks/hidden.py" not in page


@pytest.fixture(scope="module")
def trouble(release, tmp_path_factory):
    """Submissions that try the grader, graded."""
    folder = tmp_path_factory.mktemp("hostile")
    blank = released(release("ps1"), "ps1")
    for student, notebook in hostile.submissions(blank).items():
        hand_in(folder, student, notebook, "ps1")
    (folder / "nothing").mkdir()
    (folder / "torn").mkdir()
    (folder / "torn" / "ps1.ipynb").write_text('{"cells": [{"cell_type": "co')
    (folder / "Otto, renamed [1]").mkdir()
    odd = '{"cells": [1, {"id": 7}, {"id": "nm_mask-answer", "source": {"a": 1}, "metadata": 3}], "nbformat": 2}'
    (folder / "Otto, renamed [1]" / "homework (final).ipynb").write_text(odd)
    return graded(folder, tmp_path_factory.mktemp("graded") / "out", "ps1", 30, 120)


EACH = dict.fromkeys(["magnitude_mask", "global_magnitude_masks", "nm_mask", "wanda_mask"], 3)
EACH |= {"feature_norms": 4, "perplexity": 4}
GONE = "the process of the notebook ended (exit, a crash, or too much memory), in cell wanda_mask-answer"
UNSTOPPABLE = (
    "the notebook could not be stopped after its time was over: does a loop never end?, in cell feature_norms-answer"
)
TAMPERED = "the checks do not work any more, after what the notebook has changed"


@pytest.mark.parametrize(
    ("student", "lost", "reasons"),
    [
        ("six-ways", EACH, [
            "magnitude_mask: name 'magnitude_mask' is not defined; was it renamed, or its cell deleted?",
            "global_magnitude_masks raised IndexError: list index out of range; it was called with [a tensor [6, 8], ",
            "nm_mask raised RuntimeError: ",
            "feature_norms raised MemoryError; it was called with a Sequential, '0', [a tensor [6, 5, 6]]",
            "wanda_mask calls sparselab's wanda, which is the answer key",
            "perplexity raised SystemExit",
        ]),
        ("endless", ["magnitude_mask"], ["magnitude_mask ran for more than 20 s: does a loop never end?"]),
        ("endless-cell", ["nm_mask"], ["cell nm_mask-answer was stopped after 30 s: does a loop never end?"]),
        ("unstoppable", ["feature_norms", "wanda_mask", "perplexity"], [
            f"{UNSTOPPABLE}; nothing after it was run", f"perplexity: {UNSTOPPABLE}",
        ]),
        ("gone", ["wanda_mask", "perplexity"], [f"{GONE}; nothing after it was run", f"perplexity: {GONE}"]),
        ("flood", ["nm_mask"], ["nm_mask returns None, expected a boolean tensor [4, 16]"]),
        ("loud", [], []),
        ("chatty", [], []),
        ("helped", [], []),
        ("leaking", ["nm_mask"], ["nm_mask: (what shows the grader's files is left out)"]),
        ("curious", [], []),
        ("deleted", ["magnitude_mask"], [
            "cells deleted, and put back: magnitude_mask-answer, magnitude_mask-visible, magnitude_mask-hidden",
            "magnitude_mask is not written yet",
        ]),
        ("edited", EACH, ["cells changed, and run as they were handed out: nm_mask-visible, nm_mask-hidden"]),
        ("checks", EACH, ["perplexity is not written yet"]),
        ("torch", EACH, [f"magnitude_mask: {TAMPERED}", "perplexity is not written yet"]),
        ("nothing", EACH, ["expected ps1.ipynb, found 0 other notebooks"]),
        ("torn", EACH, ["ps1.ipynb cannot be read as a notebook"]),
        ("Otto, renamed [1]", EACH, ["homework (final).ipynb was taken for ps1.ipynb"]),
    ],
)  # fmt: skip
def test_whatever_is_handed_in_gets_a_score_and_a_reason(trouble, student, lost, reasons):
    row = trouble.rows[student]
    found = {exercise: float(row[exercise]) for exercise in EACH}
    assert found == {exercise: 0 if exercise in lost else points for exercise, points in EACH.items()}, row["reasons"]
    for reason in reasons:
        assert reason in row["reasons"]
    if not reasons:
        assert row["reasons"] == ""
    key = "Otto_renamed_1_" if student.startswith("Otto") else student
    assert sum(trouble.points(key).values()) == float(row["points"]) == sum(found.values())
    assert "checks/hidden.py" not in trouble.feedback(key)
    assert float(row["of"]) == sum(EACH.values()) + 4


COMMAND = [sys.executable, "-m", "sparselab.course"]


def _run(*words: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, **how)


@pytest.fixture(scope="module")
def interrupted(release, tmp_path_factory):
    """Three submissions, graded by a process that was killed once the first was done, and then by another."""
    folder, out = tmp_path_factory.mktemp("three"), tmp_path_factory.mktemp("graded") / "out"
    blank = released(release("ps1"), "ps1")
    answers = answered(blank, reference("ps1") | {"question-answer": "Because."})
    for student in ("one", "two", "three"):
        hand_in(folder, student, answers, "ps1")
    words = ["grade", "ps1", str(folder), "--out", str(out), "--course", str(COURSE)]
    journal = out.with_name(".out.unfinished") / "journal.jsonl"
    with subprocess.Popen([*COMMAND, *words], stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    first = next(journal.parent.glob("autograded/*/ps1/ps1.ipynb"))
    before = first.stat().st_mtime_ns
    refused = _run(*words)
    resumed = _run(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    return folder, out, words, refused, (out / first.relative_to(journal.parent)).stat().st_mtime_ns == before


def test_a_killed_grader_goes_on_where_it_was(interrupted):
    _folder, out, _words, refused, kept = interrupted
    assert refused.returncode == 1
    assert "holds what an interrupted run has finished; pass --resume" in refused.stderr
    assert kept, "who is graded is not graded again"
    with (out / "grades.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["student"] for row in rows] == ["one", "three", "two"]
    assert {(row["points"], row["of"], row["by_hand"], row["reasons"]) for row in rows} == {("20", "24", "4", "")}


def test_points_given_by_hand_count_and_are_not_lost(interrupted, monkeypatch):
    folder, out, words, *_ = interrupted
    with nbgrader_api.Gradebook(f"sqlite:///{out / 'gradebook.db'}") as book:
        score = book.find_grade("question-answer", "ps1", "ps1", "two")
        score.manual_score, score.needs_manual_grade = 3, False
        book.db.commit()
    monkeypatch.chdir(out.parent)
    rows = {row["student"]: row for row in renew(Path(out.name))}
    assert (rows["two"]["points"], rows["two"]["question"], rows["two"]["by_hand"]) == ("23", "3", "0")
    assert (rows["one"]["points"], rows["one"]["by_hand"]) == ("20", "4")
    assert "Score: 23.0 / 24.0" in (out / "feedback" / "two" / "ps1" / "ps1.html").read_text()
    again = _run(*words, "--overwrite")
    assert (again.returncode, "points or comments given by hand" in again.stderr) == (1, True)
    with pytest.raises(ValueError, match="expected a folder of graded submissions"):
        renew(folder)


def test_wrong_commands_are_told_in_a_line(release, tmp_path):
    course = ["--course", str(COURSE)]
    (tmp_path / "empty").mkdir()
    for words, code, line in (
        (["grade", "ps9", str(tmp_path), *course], 1, "problem set: expected one of ps1"),
        (["grade", "ps1", str(tmp_path / "empty"), *course], 1, "found nothing of the kind"),
        (["grade", "ps1", str(tmp_path), *course, "--workers", "0"], 1, "workers: expected at least 1, received 0"),
        (["grade", "ps1", str(tmp_path), *course, "--seconds", "0"], 1, "seconds: expected a number above 0"),
        (["assignment", "ps1", *course, "--out", str(release("ps1"))], 1, "pass --overwrite or another --out"),
        (["grades", str(tmp_path)], 1, "expected a folder of graded submissions"),
        (["grade"], 2, "required: problem_set, submissions"),
        ([], 2, "required: COMMAND"),
    ):
        done = _run(*words, cwd=tmp_path)
        assert (done.returncode, line in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
