"""The student version of a problem set: without solutions, without hidden checks, with what else it needs."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

from sparselab import files
from sparselab.errors import SparselabError


class CourseError(SparselabError):
    """nbgrader could not do its part."""


def make_assignment(course: Path, problem_set: str, out: Path, overwrite: bool = False) -> list[str]:
    """Write the student version of a problem set into a folder.

    Args:
        course: folder with `source/` and `instructor/`; what is handed out beside a notebook lies above it.
        problem_set: a folder of `source/`, say "ps1".
        out: an absent or empty folder.
        overwrite: replace an earlier one.

    Returns:
        Names of the files to hand out.

    Raises:
        ValueError: there is no such problem set.
        OutputError: see `files.check_output`.
        CourseError: nbgrader refuses the source.
    """
    check_problem_set(course, problem_set)
    with files.finished_output(out, overwrite, [course]) as folder:
        root = folder / "nbgrader"
        release(course, problem_set, root)
        for path in sorted((root / "release" / problem_set).iterdir()):
            shutil.move(path, folder / path.name)
        shutil.rmtree(root)
        files.write_stamp(folder, "assignment", {"problem_set": problem_set})
        return sorted(path.name for path in folder.iterdir() if path.name != files.STAMP)


def release(course: Path, problem_set: str, root: Path) -> None:
    """Make an nbgrader course folder with one problem set: source, release, and a gradebook that knows its cells."""
    source = root / "source" / problem_set
    source.mkdir(parents=True)
    shutil.copy(course / "source" / problem_set / f"{problem_set}.ipynb", source)
    (root / "nbgrader_config.py").write_text(_CONFIG.format(problem_set=problem_set), encoding="utf-8")
    done(nbgrader(root).generate_assignment(problem_set), problem_set)
    for name in extras(course, problem_set)["hand_out"]:
        shutil.copy(course.parent / name, root / "release" / problem_set)


def extras(course: Path, problem_set: str) -> dict[str, list[str]]:
    """Names of files that are handed out (`hand_out`) and handed in (`hand_in`) beside the notebook, as it says."""
    written = json.loads((course / "source" / problem_set / f"{problem_set}.ipynb").read_text(encoding="utf-8"))
    said: dict[str, list[str]] = written["metadata"].get("sparselab", {})
    return {"hand_out": [], "hand_in": []} | said


def check_problem_set(course: Path, problem_set: str) -> None:
    """Raise ValueError if there is no such problem set."""
    there = sorted(path.stem for path in course.glob("source/*/*.ipynb"))
    if problem_set not in there:
        raise ValueError(f"problem set: expected one of {', '.join(there) or course}, received {problem_set!r}")


def nbgrader(root: Path, **settings: dict[str, Any]) -> NbGraderAPI:
    """What runs nbgrader in a course folder, with settings by the class they are for; no configuration file is read."""
    programs = str(Path(sys.executable).parent)  # it calls alembic by name
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
    root = root.resolve()  # nbgrader changes the current folder
    place = {"root": str(root), "db_url": f"sqlite:///{database(root)}"}
    config = Config(CourseDirectory=place, Exchange={"root": str(root)}, **settings)
    return NbGraderAPI(config=config)


def done(result: dict[str, Any], what: str) -> None:
    """Raise CourseError if a call to nbgrader has failed."""
    if not result["success"]:
        raise CourseError(f"{what}: nbgrader failed:\n{result.get('log', '')}{result['error']}")


def database(root: Path) -> Path:
    """The gradebook of a course folder."""
    return root / "gradebook.db"


def handed_out(root: Path, problem_set: str) -> NotebookNode:
    """The released notebook in a course folder that `release` made."""
    notebook: NotebookNode = nbformat.read(root / "release" / problem_set / f"{problem_set}.ipynb", as_version=4)
    return notebook


_CONFIG = """# nbgrader's settings: `jupyter lab` started in this folder has its formgrader, to give points by hand.
c = get_config()
c.CourseDirectory.course_id = "{problem_set}"
"""
