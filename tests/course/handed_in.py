"""What students hand in, made from the instructor's answers: the reference, other right answers, every mistake."""

import ast
import copy
import importlib
import inspect
import sys
from collections.abc import Callable
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
    function = inspect.getsource(given.answer)
    parts = {node: ast.get_source_segment(text, node) for node in ast.parse(text).body[1:]}  # without the docstring
    others = {node: part for node, part in parts.items() if isinstance(node, ast.FunctionDef) and "__" in node.name}
    needed = "\n".join(part for node, part in parts.items() if node not in others)
    while missing := [
        part for node, part in others.items() if f"{node.name}(" in needed + function and part not in needed + function
    ]:
        needed = "\n".join([needed, *missing])
    return f"{needed}\n\n" + function.replace(f"def {given.answer.__name__}(", f"def {given.exercise}(")


def right_and_wrong(problem_set: str) -> dict[str, dict[str, Given]]:
    """Submissions by name, an answer for each exercise: each wrong answer in one, each right one in another."""
    made: dict[str, dict[str, Given]] = {}
    for name, kinds in (("right", RIGHT), ("wrong", WRONG)):
        counts: dict[str, int] = {}
        for given in (given for given in kinds if given.problem_set == problem_set):
            number = counts[given.exercise] = counts.get(given.exercise, 0) + 1
            made.setdefault(f"{name}-{number}", {})[given.exercise] = given
    return made


def tables(problem_set: str) -> dict[str, Callable]:
    """What turns the true table of a sweep into the one that a submission of this name comes with."""
    made: dict[str, Callable] = {}
    answers = vars(importlib.import_module(f"{problem_set}_answers"))
    for name in ("right", "wrong"):
        found = [function for each, function in answers.items() if each.startswith(f"table_{name}_")]
        made |= {f"{name}-{number + 1}": function for number, function in enumerate(found)}
    return made


def hand_in(folder: Path, student: str, notebook: NotebookNode, problem_set: str, **others: str) -> None:
    (folder / student).mkdir(parents=True)
    nbformat.write(notebook, folder / student / f"{problem_set}.ipynb")
    for name, text in others.items():
        (folder / student / name.replace("_", ".")).write_text(text)
