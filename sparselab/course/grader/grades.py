"""What came of a graded folder: a row for each student, with points by exercise and the reasons for those that lack."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook, MissingEntry

from sparselab import files
from sparselab.course.grader.execution import REMARKS
from sparselab.course.grader.handout import database, done, handed_out, nbgrader
from sparselab.course.grader.submission import exercises
from sparselab.journal import read_journal

GRADES = "grades.csv"


def write_grades(root: Path) -> list[dict[str, str]]:
    """Write `grades.csv` from the gradebook of a graded folder, points given by hand included.

    Args:
        root: a folder that `grade` has made, or is making.

    Returns:
        Its rows, by student: student, points, of, by_hand (points of answers that a person has yet to read), one column
        for each exercise, reasons: what went wrong, exercise by exercise, and what was odd about the submission; and
        feedback: the path of the page for the student.
    """
    work, entries = read_journal(root / files.JOURNAL)
    problem_set = (work or {})["problem_set"]
    most = _most(root, problem_set)
    with Gradebook(f"sqlite:///{database(root)}") as book:
        rows = [_row(root, book, problem_set, entry, most) for entry in sorted(entries, key=lambda each: each["name"])]
    text = io.StringIO()
    names = ["student", "points", "of", "by_hand", *most, "reasons", "feedback"]
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_text(root / GRADES, text.getvalue())
    return rows


def renew(root: Path) -> list[dict[str, str]]:
    """Write table and feedback of a graded folder anew, once points have been given by hand; see `write_grades`.

    Raises:
        ValueError: `grade` has not made this folder.
        CourseError: nbgrader cannot write the feedback.
    """
    stamp = files.read_stamp(root)
    if stamp is None or stamp["command"] != "grade":
        raise ValueError(f"{root}: expected a folder of graded submissions, as `grade` makes them")
    problem_set = stamp["settings"]["problem_set"]
    done(nbgrader(root).generate_feedback(problem_set), problem_set)
    return write_grades(root)


def _most(root: Path, problem_set: str) -> dict[str, float]:
    """The most points that each exercise can give."""
    most: dict[str, float] = {}
    for exercise, cell in exercises(handed_out(root, problem_set)):
        most[exercise] = most.get(exercise, 0) + cell.metadata.nbgrader["points"]
    return most


def _row(
    root: Path, book: Gradebook, problem_set: str, entry: dict[str, str], most: dict[str, float]
) -> dict[str, str]:
    points, waiting = dict.fromkeys(most, 0.0), 0.0
    try:
        for score in book.find_submission_notebook(problem_set, problem_set, entry["key"]).grades:
            points[score.name.rpartition("-")[0]] += score.score
            waiting += score.max_score if score.needs_manual_grade else 0
    except MissingEntry:
        pass  # nbgrader did not come so far; the reason says why
    reasons = [entry["problem"]] if entry["problem"] else list(_reasons(root, problem_set, entry["key"]))
    numbers = {"points": sum(points.values()), "of": sum(most.values()), "by_hand": waiting} | points
    written = {name: f"{number:g}" for name, number in numbers.items()}
    page = "" if entry["problem"] else f"feedback/{entry['key']}/{problem_set}/{problem_set}.html"
    return {"student": entry["name"]} | written | {"reasons": " | ".join(reasons), "feedback": page}


def _reasons(root: Path, problem_set: str, key: str) -> Iterator[str]:
    """What the graded notebook says of itself, and of each exercise the first thing that is wrong."""
    notebook = nbformat.read(root / "autograded" / key / problem_set / f"{problem_set}.ipynb", as_version=4)
    yield from notebook.metadata.get(REMARKS, [])
    told = set()
    for exercise, cell in exercises(notebook):
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if errors and exercise not in told:
            told.add(exercise)
            reason = " ".join(errors[0].evalue.split())
            yield reason if reason.startswith(exercise) else f"{exercise}: {reason}"
