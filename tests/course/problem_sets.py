"""The problem sets as they lie in the repository: sources, checks, and the instructor's right and wrong answers."""

import importlib
from pathlib import Path
from typing import NamedTuple

COURSE = Path(__file__).parents[2] / "notebooks" / "course"
INSTRUCTOR = COURSE / "instructor"


class Given(NamedTuple):
    """One of the instructor's answers: `EXERCISE__right_STYLE` or `EXERCISE__wrong_MISTAKE`."""

    problem_set: str
    exercise: str
    kind: str
    answer: object

    def __str__(self) -> str:
        return f"{self.problem_set}-{self.exercise}-{self.kind}"

    @property
    def check(self):
        """The visible check of the exercise."""
        return getattr(importlib.import_module(f"sparselab.course.{self.problem_set}"), self.exercise)


def answers(problem_set: str) -> list[Given]:
    given = vars(importlib.import_module(f"{problem_set}_answers"))
    return [Given(problem_set, *name.split("__"), answer) for name, answer in given.items() if "__" in name.strip("_")]


SOURCES = sorted(COURSE.glob("source/*/ps*.ipynb"))
ANSWERS = [given for path in SOURCES for given in answers(path.stem)]
RIGHT = [given for given in ANSWERS if given.kind.startswith("right")]
WRONG = [given for given in ANSWERS if given.kind.startswith("wrong")]
EXERCISES = {(given.problem_set, given.exercise): None for given in ANSWERS}
