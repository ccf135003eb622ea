"""Every wrong answer is caught by the visible and by the hidden check, and no right one is."""

import hidden
import pytest
from problem_sets import EXERCISES, RIGHT, WRONG

from sparselab.course import CheckError


@pytest.mark.parametrize("given", RIGHT, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_right_answer_is_right_in_any_style(given, seed):
    assert given.check(given.answer, seed).startswith(given.answer.__name__)


@pytest.mark.parametrize("given", WRONG, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wrong_answer_is_caught(given, seed):
    with pytest.raises(CheckError) as caught:
        given.check(given.answer, seed)
    assert given.answer.__name__ in str(caught.value)


@pytest.mark.parametrize("exercise", EXERCISES, ids="-".join)
def test_each_exercise_has_three_right_answers_and_some_wrong_ones(exercise):
    assert sum(given[:2] == exercise for given in RIGHT) >= 3
    assert sum(given[:2] == exercise for given in WRONG) >= 4


@pytest.mark.parametrize("given", RIGHT, ids=str)
def test_hidden_checks_pass_what_is_right(given):
    hidden.check(given.problem_set, given.exercise, given.answer)


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_hidden_checks_catch_what_is_wrong_and_tell_nothing(given):
    with pytest.raises(AssertionError) as caught:
        hidden.check(given.problem_set, given.exercise, given.answer)
    assert str(caught.value) == f"{given.exercise}: a hidden check fails"
    assert caught.value.__context__ is None
