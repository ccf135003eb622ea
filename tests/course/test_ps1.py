"""Every wrong answer is caught by its check, and no right one is."""

import sys
from pathlib import Path

import pytest

from sparselab.course import CheckError, ps1

INSTRUCTOR = Path(__file__).parents[2] / "notebooks" / "course" / "instructor"
sys.path.insert(0, str(INSTRUCTOR))

import ps1_answers  # noqa: E402

ANSWERS = [(*name.split("__"), answer) for name, answer in vars(ps1_answers).items() if "__" in name.strip("_")]
RIGHT = [(exercise, answer) for exercise, kind, answer in ANSWERS if kind.startswith("right")]
WRONG = [(exercise, answer) for exercise, kind, answer in ANSWERS if kind.startswith("wrong")]
EXERCISES = {exercise for exercise, _, _ in ANSWERS}


def name(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("exercise", "answer"), RIGHT, ids=name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_right_answer_is_right_in_any_style(exercise, answer, seed):
    assert getattr(ps1, exercise)(answer, seed).startswith(answer.__name__)


@pytest.mark.parametrize(("exercise", "answer"), WRONG, ids=name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wrong_answer_is_caught(exercise, answer, seed):
    with pytest.raises(CheckError) as caught:
        getattr(ps1, exercise)(answer, seed)
    assert answer.__name__ in str(caught.value)


def test_each_exercise_has_three_right_answers_and_some_wrong_ones():
    assert len(EXERCISES) == 6
    for exercise in EXERCISES:
        assert sum(exercise == each for each, _ in RIGHT) >= 3
        assert sum(exercise == each for each, _ in WRONG) >= 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("magnitude_mask__wrong_ties", r"Ties\? Of equal scores only as many may go as are needed"),
        ("magnitude_mask__wrong_in_place", "changes its argument 1 in place"),
        ("magnitude_mask__wrong_float", r"a torch.float32 tensor \[8, 8\], expected a boolean tensor"),
        ("magnitude_mask__wrong_largest", "the smallest have to go"),
        ("global_magnitude_masks__wrong_per_layer", "every layer loses the same fraction: let all compete"),
        ("nm_mask__wrong_pruned", r"at 1:4: row 0, inputs 0 to 3 keeps 3 of 4, expected 1"),
        ("feature_norms__wrong_mean", "the mean square is taken: Wanda sums"),
        ("feature_norms__wrong_square", "the square root is missing"),
        ("feature_norms__wrong_sum_of_norms", r"layer 0, batches of \[2, 4\]: input"),
        ("feature_norms__wrong_hook_stays", "leaves a hook on the model"),
        ("wanda_mask__wrong_layer", "row 1 keeps 3 of 8, expected 4"),
        ("perplexity__wrong_mean_of_means", "every token counts alike"),
        ("perplexity__wrong_padding", "padding counts as well"),
        ("perplexity__wrong_no_exp", "exp is missing"),
    ],
)
def test_the_message_says_what_to_look_at(answer, message):
    exercise = answer.partition("__")[0]
    with pytest.raises(CheckError, match=message):
        getattr(ps1, exercise)(getattr(ps1_answers, answer))
