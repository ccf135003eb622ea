"""Hidden checks: the visible ones on numbers that nobody has seen. They say pass or fail, no more."""

import importlib
import secrets

from sparselab.course import CheckError

ROUNDS = 5


def check(problem_set, exercise, answer):
    """Raise one terse AssertionError if an answer fails on any of several draws."""
    visible = getattr(importlib.import_module(f"sparselab.course.{problem_set}"), exercise)
    for _ in range(ROUNDS):
        try:
            visible(answer, seed=secrets.randbits(32))
        except CheckError:
            passed = False
        else:
            passed = True
        if not passed:  # outside of the handler, so that no traceback of the check comes along
            raise AssertionError(f"{exercise}: a hidden check fails")
