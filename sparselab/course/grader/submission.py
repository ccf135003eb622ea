"""What students hand in: found in a folder, and put into the notebook that was handed out, whatever was done to it."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

NOT_GRADED = "not-graded"  # tag of cells that no check needs, and that take long


@dataclass(frozen=True)
class Submission:
    """One student's work.

    Args:
        student: as the folder or file is named.
        notebook: what was handed in; None if there is none.
        others: further files, by name, of those that the problem set asks for.
        remarks: what was odd about it.
    """

    student: str
    notebook: Path | None
    others: dict[str, Path] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The student's name with letters, digits, dots, dashes and underscores alone: folders are named by it."""
        return re.sub(r"[^\w.-]+", "_", self.student).lstrip(".-") or "_"


def find_submissions(
    folder: Path, problem_set: str, hand_in: Sequence[str] = (), hand_out: Sequence[str] = ()
) -> list[Submission]:
    """All submissions in a folder, by name: `NAME/ps1.ipynb`, `NAME/ps1/ps1.ipynb` or `NAME.ipynb`.

    A folder with no such notebook, but with one of another name, is taken to mean that one.

    Args:
        folder: a folder or a file for each student.
        problem_set: name of the notebook, without its ending.
        hand_in: names of further files that are asked for.
        hand_out: names of files that students got beside the notebook, and may have left there.

    Raises:
        ValueError: there is no such folder, nothing in it, or two names that cannot be told apart.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with one folder or notebook for each student, found none")
    places = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [
        _submission(path, problem_set, hand_in, hand_out) for path in places if path.is_dir() or path.suffix == ".ipynb"
    ]
    if not found:
        raise ValueError(f"{folder}: expected one folder or notebook for each student, found nothing of the kind")
    keys: dict[str, str] = {}
    for each in found:
        if other := keys.get(each.key.casefold()):
            raise ValueError(f"{folder}: {other!r} and {each.student!r} cannot be told apart; rename one of them")
        keys[each.key.casefold()] = each.student
    return found


def _submission(path: Path, problem_set: str, hand_in: Sequence[str], hand_out: Sequence[str]) -> Submission:
    if not path.is_dir():
        return Submission(path.stem, path)
    folder = path / problem_set if any((path / problem_set).glob("*.ipynb")) else path
    there = sorted(each for each in folder.glob("*.ipynb") if not each.name.startswith("."))
    notebooks = [each for each in there if each.name not in hand_out]
    others = {name: folder / name for name in hand_in if (folder / name).is_file()}
    named = folder / f"{problem_set}.ipynb"
    if named in notebooks:
        return Submission(path.name, named, others)
    if len(notebooks) == 1:
        return Submission(path.name, notebooks[0], others, (f"{notebooks[0].name} was taken for {named.name}",))
    return Submission(path.name, None, others, (f"expected {named.name}, found {len(notebooks)} other notebooks",))


def assembled(handed_out: NotebookNode, path: Path | None) -> tuple[NotebookNode, list[str]]:
    """The notebook that was handed out, with a student's answers and other cells in it.

    Cells that check are as they were handed out, cells that were deleted are back, and nothing of the student's
    metadata is left: what is graded has the form that the grader knows. Cells that are not run when graded are run
    after all, if the student has changed one of them or written code in new cells, which may need them.

    Args:
        handed_out: the released notebook.
        path: what was handed in; None, or a file that is no notebook, counts as no answers.

    Returns:
        A new notebook, and remarks on what was changed.
    """
    cells, remarks = _read(path)
    known = {cell.id: cell for cell in handed_out.cells}
    theirs: dict[str, dict[str, Any]] = {}
    extra: dict[str | None, list[NotebookNode]] = {}
    last = None
    for cell in cells:
        place = _place(cell, known)
        if place is None or place in theirs:
            extra.setdefault(last, []).append(_plain(cell))
        else:
            theirs[place], last = cell, place
    result = nbformat.from_dict(handed_out)
    result.cells = list(extra.get(None, []))
    for name, cell in known.items():
        result.cells += [_merged(cell, theirs.get(name)), *extra.get(name, [])]
    own_code = any(cell.cell_type == "code" for cells in extra.values() for cell in cells)
    if own_code or any(_is_changed(known[name], cell) for name, cell in theirs.items() if _is_not_graded(known[name])):
        for cell in result.cells:
            cell.metadata.pop("tags", None)
    return result, remarks + (_changes(known, theirs) if cells else [])


def _read(path: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    if path is None:
        return [], []
    try:
        cells: Any = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        cells = None
    if not isinstance(cells, list):
        return [], [f"{path.name} cannot be read as a notebook"]
    return [cell for cell in cells if isinstance(cell, dict)], []


def _place(cell: dict[str, Any], known: dict[str, NotebookNode]) -> str | None:
    """Which cell that was handed out this is: by what nbgrader calls it, else by its id."""
    metadata = cell.get("metadata")
    nbgrader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    for name in (nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None, cell.get("id")):
        if isinstance(name, str) and name in known:
            return name
    return None


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", "")
    return "".join(map(str, source)) if isinstance(source, list) else str(source)


def _plain(cell: dict[str, Any]) -> NotebookNode:
    source = _source(cell)
    made: NotebookNode = new_code_cell(source) if cell.get("cell_type") == "code" else new_markdown_cell(source)
    _attach(made, cell)
    return made


def _attach(made: NotebookNode, cell: dict[str, Any]) -> None:
    """Take over the pictures that are pasted into a text."""
    pictures = cell.get("attachments")
    if made.cell_type == "markdown" and isinstance(pictures, dict):
        sound = {
            name: each
            for name, each in pictures.items()
            if isinstance(each, dict) and all(isinstance(data, str) for data in each.values())
        }
        if sound:
            made.attachments = nbformat.from_dict(sound)


def _is_not_graded(cell: NotebookNode) -> bool:
    tags: list[str] = cell.metadata.get("tags", [])
    return NOT_GRADED in tags


def _is_changed(cell: NotebookNode, theirs: dict[str, Any]) -> bool:
    return bool(_source(theirs).strip() != cell.source.strip())


def _merged(cell: NotebookNode, theirs: dict[str, Any] | None) -> NotebookNode:
    """A cell that was handed out, with the student's text where that is allowed."""
    merged: NotebookNode = nbformat.from_dict(cell)
    if theirs is not None and not _locked(cell):
        merged.source = _source(theirs)
        _attach(merged, theirs)
    return merged


def _changes(known: dict[str, NotebookNode], theirs: dict[str, dict[str, Any]]) -> list[str]:
    """What was done to cells that answer or check."""
    lacking = [name for name, cell in known.items() if "nbgrader" in cell.metadata and name not in theirs]
    changed = [name for name, cell in theirs.items() if _locked(known[name]) and _is_changed(known[name], cell)]
    found = {"deleted, and put back": lacking, "changed, and run as they were handed out": changed}
    return [f"cells {what}: {', '.join(names)}" for what, names in found.items() if names]


def _locked(cell: NotebookNode) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("locked"))


def exercises(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The graded cells of a notebook, each with the name of its exercise: `NAME-visible` belongs to NAME."""
    for cell in notebook.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        if nbgrader.get("grade"):
            yield nbgrader["grade_id"].rpartition("-")[0], cell
