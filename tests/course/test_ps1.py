"""What the checks of problem set 1 say of the mistakes that students make."""

import ps1_answers
import pytest

from sparselab.course import CheckError, ps1


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
