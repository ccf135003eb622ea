"""Problem sets as they are written, and as students get them."""

import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, ClearSolutions, LockCells
from problem_sets import EXERCISES, INSTRUCTOR, SOURCES

RELEASE = (LockCells, ClearSolutions, ClearOutput, ClearHiddenTests)


def read(path):
    return nbformat.read(path, as_version=4)


def released(path):
    """What nbgrader's generate_assignment makes of a source."""
    notebook = read(path)
    for step in RELEASE:
        notebook, _ = step().preprocess(notebook, {})
    return notebook


def run(notebook, monkeypatch, folder, **how):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(folder)}}, **how).execute()
    return {cell.id: cell for cell in notebook.cells}


def test_there_are_sources():
    assert [path.stem for path in SOURCES] == ["ps1"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_each_exercise_is_taught_answered_and_checked_twice(path):
    cells = {cell.id: cell for cell in read(path).cells}
    exercises = [each.removesuffix("-answer") for each, cell in cells.items() if "BEGIN SOLUTION" in cell.source]
    assert set(exercises) == {exercise for problem_set, exercise in EXERCISES if problem_set == path.stem}
    for exercise in exercises:
        graded = [cells[f"{exercise}-{kind}"].metadata.nbgrader for kind in ("visible", "hidden")]
        assert all(each.grade and each.locked and each.points > 0 for each in graded)
        assert not cells[f"{exercise}-answer"].metadata.nbgrader.locked
    assert "Expected time" in cells["title"].source
    assert cells["question-answer"].metadata.nbgrader.grade, "one written question"
    for cell in cells.values():
        assert len(cell.source.splitlines()) <= 18
        assert not cell.get("outputs")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_students_get_no_solution_and_no_hidden_check(path):
    text = "\n".join(cell.source for cell in released(path).cells if cell.cell_type == "code")
    assert text.count("raise NotImplementedError()") == 6
    assert not [word for word in ("SOLUTION", "HIDDEN", "import hidden", "argsort", "topk") if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_reference_passes_in_time(path, monkeypatch):
    started = time.monotonic()
    cells = run(read(path), monkeypatch, INSTRUCTOR)
    assert time.monotonic() - started < 180
    outputs = [*cells["together-run"].outputs, *cells["together-prune"].outputs]
    lines = "".join(output.text for output in outputs if output.output_type == "stream").splitlines()
    dense, mine, theirs = (float(line.split()[-1]) for line in lines if line[:5] in ("dense", "by yo", "by sp"))
    assert dense < mine < 1.2 * dense
    assert mine == pytest.approx(theirs, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_is_not_written_yet_says_so(path, monkeypatch, tmp_path):
    cells = run(released(path), monkeypatch, tmp_path, allow_errors=True)
    for each, cell in cells.items():
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if each.endswith("-visible"):
            exercise = each.removesuffix("-visible")
            assert (errors[0].ename, errors[0].evalue) == ("CheckError", f"{exercise} is not written yet")
        else:
            assert not errors or each.startswith("together")
