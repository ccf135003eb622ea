"""Hidden checks: the visible ones on numbers that nobody has seen. They say pass or fail, no more."""

import importlib
import secrets
import sys
import types

import torch

ROUNDS = 5


def check(problem_set, exercise, answer):
    """Raise one terse AssertionError if an answer fails on any of several draws."""
    checks = importlib.import_module(f"sparselab.course.{problem_set}")
    if not all(_passes(checks, exercise, answer) for _ in range(ROUNDS)):
        raise AssertionError(f"{exercise}: a hidden check fails")
    _check_the_check(checks, exercise, answer)


def fresh(problem_set):
    """The visible checks as they are on disk, whatever a notebook has put in their place."""
    for name in [name for name in sys.modules if name.startswith("sparselab.course")]:
        del sys.modules[name]
    checks = importlib.import_module(f"sparselab.course.{problem_set}")

    def guarded(exercise):
        def run(answer):
            said = getattr(checks, exercise)(answer)
            _check_the_check(checks, exercise, answer)
            return said

        return run

    return types.SimpleNamespace(**{name: guarded(name) for name in vars(checks) if not name.startswith("_")})


def _check_the_check(checks, exercise, answer):
    """After an answer has passed, a spoiled one must fail; if it does not, torch or the checks were tampered with."""
    if callable(answer) and _passes(checks, exercise, lambda *arguments: _spoiled(answer(*arguments))):
        raise AssertionError(f"{exercise}: the checks do not work any more, after what the notebook has changed")


def _passes(checks, exercise, answer):
    # The error is not raised from here, so that no traceback of the check comes along.
    try:
        getattr(checks, exercise)(answer, seed=secrets.randbits(32))
    except checks.CheckError:
        return False
    return True


def _spoiled(value):
    if isinstance(value, dict):
        return {name: _spoiled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_spoiled, value))
    if isinstance(value, torch.Tensor):
        return ~value if value.dtype == torch.bool else value + 1
    return value + 1 if isinstance(value, int | float) else None
