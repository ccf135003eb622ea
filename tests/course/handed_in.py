"""What students hand in, made from the instructor's answers: the reference, other right answers, every mistake."""

import ast
import copy
import inspect
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from problem_sets import COURSE, RIGHT, WRONG, Given


def released(folder: Path, problem_set: str) -> NotebookNode:
    return nbformat.read(folder / f"{problem_set}.ipynb", as_version=4)


def answered(notebook: NotebookNode, sources: dict[str, str]) -> NotebookNode:
    """A copy with these sources in place of those of cells with these ids."""
    made = copy.deepcopy(notebook)
    missing = set(sources) - {cell.id for cell in made.cells}
    assert not missing, missing
    for cell in made.cells:
        cell.source = sources.get(cell.id, cell.source)
    return made


def reference(problem_set: str) -> dict[str, str]:
    """The solutions of the source, by the id of their cell, as they would be typed."""
    source = nbformat.read(COURSE / "source" / problem_set / f"{problem_set}.ipynb", as_version=4)
    marks = ("### BEGIN SOLUTION", "### END SOLUTION")
    return {
        cell.id: "\n".join(line for line in cell.source.splitlines() if line.strip() not in marks)
        for cell in source.cells
        if marks[0] in cell.source
    }


def as_typed(given: Given) -> str:
    """The text of an answer under the exercise's name, after what it needs of its module."""
    text = inspect.getsource(sys.modules[given.answer.__module__])
    parts = [node for node in ast.parse(text).body if not (isinstance(node, ast.FunctionDef) and "__" in node.name)]
    needed = [ast.get_source_segment(text, node) for node in parts[1:]]  # the first is the docstring
    function = inspect.getsource(given.answer).replace(f"def {given.answer.__name__}(", f"def {given.exercise}(")
    return "\n".join([*needed, "", function])


def right_and_wrong(problem_set: str) -> dict[str, dict[str, Given]]:
    """Submissions by name, an answer for each exercise: each wrong answer in one, each right one in another."""
    made: dict[str, dict[str, Given]] = {}
    for name, kinds in (("right", RIGHT), ("wrong", WRONG)):
        counts: dict[str, int] = {}
        for given in (given for given in kinds if given.problem_set == problem_set):
            number = counts[given.exercise] = counts.get(given.exercise, 0) + 1
            made.setdefault(f"{name}-{number}", {})[given.exercise] = given
    return made


def hand_in(folder: Path, student: str, notebook: NotebookNode, problem_set: str, **others: str) -> None:
    (folder / student).mkdir(parents=True)
    nbformat.write(notebook, folder / student / f"{problem_set}.ipynb")
    for name, text in others.items():
        (folder / student / name.replace("_", ".")).write_text(text)
