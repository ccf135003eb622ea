"""Hidden checks of problem set 1: the visible ones on numbers that nobody has seen. They say pass or fail, no more."""

import secrets

from sparselab.course import CheckError, ps1

ROUNDS = 5


def check(exercise, answer):
    """Raise one terse AssertionError if an answer fails on any of several draws."""
    for _ in range(ROUNDS):
        try:
            getattr(ps1, exercise)(answer, seed=secrets.randbits(32))
        except CheckError:
            passed = False
        else:
            passed = True
        if not passed:  # outside of the handler, so that no traceback of the check comes along
            raise AssertionError(f"{exercise}: a hidden check fails")
