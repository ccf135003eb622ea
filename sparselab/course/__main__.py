"""For teachers: `python -m sparselab.course assignment ps1`, `grade ps1 SUBMISSIONS`, `grades FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparselab.errors import SparselabError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three commands.

    Args:
        arguments: without the program's name; None reads those of the process.

    Returns:
        0 done, 1 it failed, with one line that says why. Wrong usage leaves through SystemExit with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (KeyboardInterrupt, Exception) as error:  # whatever the libraries below raise, a teacher gets a line of it
        ours = isinstance(error, SparselabError | ValueError | OSError) and str(error)
        said = f"error: {error}" if ours else f"{type(error).__name__}: {error}".removesuffix(": ")
        print("; ".join([said, *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparselab.course", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    assignment = commands.add_parser("assignment", help="write the student version of a problem set")
    assignment.add_argument("problem_set")
    assignment.add_argument("--out", type=Path, help="folder to write; release/PROBLEM_SET unless given")
    assignment.set_defaults(run=_assignment)
    grade = commands.add_parser("grade", help="grade a folder of submissions")
    grade.add_argument("problem_set")
    grade.add_argument("submissions", type=Path, help="a folder with NAME/PROBLEM_SET.ipynb or NAME.ipynb")
    grade.add_argument("--out", type=Path, help="folder to write; graded/PROBLEM_SET unless given")
    grade.add_argument("--workers", type=int, default=1, help="students graded at a time")
    grade.add_argument("--cell-seconds", type=int, default=120, help="for one cell of a notebook")
    grade.add_argument("--seconds", type=int, default=600, help="for all cells of a notebook")
    grade.add_argument("--memory-gb", type=float, default=6.0, help="for one notebook; on Linux only")
    grade.add_argument("--resume", action="store_true", help="go on after an interrupted run")
    grade.set_defaults(run=_grade)
    for command in (assignment, grade):
        place = Path("notebooks/course")
        command.add_argument("--course", type=Path, default=place, help="folder with source/ and instructor/")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    grades = commands.add_parser("grades", help="write grades.csv and feedback anew, once points were given by hand")
    grades.add_argument("folder", type=Path, help="what grade has written")
    grades.set_defaults(run=_grades)
    return parser


def _assignment(options: argparse.Namespace) -> None:
    from sparselab.course.grader.handout import make_assignment

    out = options.out or Path("release") / options.problem_set
    names = make_assignment(options.course, options.problem_set, out, options.overwrite)
    print(f"Hand out what is in {out}: {', '.join(names)}")


def _grade(options: argparse.Namespace) -> None:
    from sparselab.course.grader.grading import Limits, grade

    out = options.out or Path("graded") / options.problem_set
    limits = Limits(options.cell_seconds, options.seconds, options.memory_gb)
    if not sys.platform.startswith("linux"):
        print("memory of the notebooks is not limited: this system cannot")
    problems = grade(
        options.course, options.problem_set, options.submissions, out, limits,
        workers=options.workers, overwrite=options.overwrite, resume=options.resume,
    )  # fmt: skip
    print(f"Written to {out}: grades.csv, feedback/")
    if problems:
        raise SparselabError(f"could not be graded, see grades.csv for the reasons: {', '.join(problems)}")


def _grades(options: argparse.Namespace) -> None:
    from sparselab.course.grader.grades import renew

    renew(options.folder)
    print(f"Written to {options.folder}: grades.csv, feedback/")


if __name__ == "__main__":
    sys.exit(main())
