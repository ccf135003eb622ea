"""What the checks of problem set 2 say of the mistakes that students make."""

import ps2_answers
import pytest
import torch
from layers import SAME_ERROR, layer

from sparselab import solvers
from sparselab.course import CheckError, ps2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("obs_scores__wrong_diagonal_of_h", "divided by the diagonal of H; first invert"),
        ("obs_scores__wrong_no_compensation", "the cost if no other weight moves"),
        ("obs_scores__wrong_half", "without the ½ of the textbooks"),
        ("obs_scores__wrong_shape", r"a torch.float32 tensor \[3, 3\], expected a tensor of numbers \[3\]"),
        ("obs_update__wrong_no_compensation", "the others do not move"),
        ("obs_update__wrong_hessian", "H stands where H⁻¹ belongs"),
        ("obs_update__wrong_sign", "the others move the wrong way"),
        ("obs_update__wrong_later_only", "only weights after q move; all others have to"),
        ("obs_update__wrong_not_quite_zero", "expected exactly 0; rounding leaves something of it"),
        ("obs_update__wrong_in_place", "changes its argument 1 in place"),
        ("damped_hessian__wrong_mean", "the mean over tokens is taken; H is their sum"),
        ("damped_hessian__wrong_no_damping", "λ on the diagonal is missing"),
        ("damped_hessian__wrong_no_mean", "λ is percdamp times the mean of the diagonal"),
        ("damped_hessian__wrong_mean_of_all", "the mean of the diagonal, not of all entries"),
        ("damped_hessian__wrong_dead_left", "dead inputs have no unit diagonal"),
        ("damped_hessian__wrong_dead_after", "dead inputs are 1 after damping"),
        ("damped_hessian__wrong_mean_before_dead", "λ is taken before dead inputs get their unit diagonal"),
        ("damped_hessian__wrong_tokens", r"tensor \[42, 42\], expected a tensor of numbers \[6, 6\]"),
        ("column_sweep__wrong_lower", "nothing is compensated: is U upper triangular"),
        ("column_sweep__wrong_masked_first", "err taken before weights become zero"),
        ("column_sweep__wrong_factor_of_h", "U is the factor of H⁻¹, not of H"),
        ("column_sweep__wrong_inverse_throughout", "H⁻¹ of all columns is used to the end"),
        ("column_sweep__wrong_not_divided", "err is w_q/U_qq: it is not divided"),
        ("column_sweep__wrong_squared", "err is w_q/U_qq, not w_q/U_qq²"),
        ("column_sweep__wrong_sign", "later columns move the wrong way"),
        (
            "column_sweep__wrong_not_zero",
            "21 pruned weights are not zero at the end; where keep is True a weight stays",
        ),
        ("column_sweep__wrong_original_errors", "err is taken from the dense weight"),
        ("column_sweep__wrong_wide_only", r"weight \[4, 11\], half of the weights pruned: entry \[\d, 5\]"),
        ("sparsegpt__wrong_blocks_apart", "blocksize 5: .*does what earlier blocks lost reach it, and once"),
        ("sparsegpt__wrong_compensated_twice", "blocksize 5: .*does what earlier blocks lost reach it, and once"),
        ("sparsegpt__wrong_original_weights", r"columns 6 to 11 \(the weights of before compensation are scored"),
        ("sparsegpt__wrong_whole_layer", "the layer as a whole loses the right number; every block has to"),
        ("sparsegpt__wrong_rows", "every row loses the same number; all rows compete"),
        ("sparsegpt__wrong_magnitude", "w² is scored; the score is w²/U_qq²"),
        ("sparsegpt__wrong_not_squared", "w²/U_qq is scored; the score is w²/U_qq²"),
        ("sparsegpt__wrong_all_may_move", "as if finished columns could move"),
        ("sparsegpt__wrong_ties", r"keeps 0 of 24, expected 13. Ties\?"),
        ("sparsegpt__wrong_floor", r"\(int\(\) where round\(\) is meant\?\) keeps 20 of 32, expected 19"),
        ("sparsegpt__wrong_rest_forgotten", r"blocksize 4: entry \[\d, 9\]"),
        ("sparsegpt__wrong_mask_ignored", "zeros are not where the mask says"),
        ("sparsegpt__wrong_keep_changed", "changes its argument 5 in place"),
        ("optimality_gap__wrong_mask_alone", "compared with the mask alone; its weights can do better"),
        ("optimality_gap__wrong_mean_of_rows", "sum errors over rows, then divide"),
        ("optimality_gap__wrong_frobenius", "H has no part in the errors"),
        ("optimality_gap__wrong_minus_one", "one too little: the ratio itself is asked for"),
        ("optimality_gap__wrong_whole_inverse", "below 1, as if something were better than the best"),
        ("optimality_gap__wrong_sqrt", "the square root of it"),
        ("optimality_gap__wrong_upside_down", "upside down"),
        ("optimality_gap__wrong_row_by_row", "expected one number for the layer"),
    ],
)
def test_the_message_says_what_to_look_at(answer, message):
    exercise = answer.partition("__")[0]
    with pytest.raises(CheckError, match=message):
        getattr(ps2, exercise)(getattr(ps2_answers, answer))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_course_and_the_library_mean_the_same(sparsity):
    weight, inputs, hessian = layer(12, 20, seed=1)
    damped = ps2_answers.damped_hessian__right_outer(inputs, 0.01)
    mine = ps2_answers.sparsegpt__right_columns(weight, damped, sparsity, 8)
    theirs = solvers.sparsegpt(weight, hessian, sparsity, percdamp=0.01, blocksize=8)
    assert torch.equal(mine == 0, theirs == 0)
    error = solvers.layer_error(weight, mine, damped)
    assert error == pytest.approx(solvers.layer_error(weight, theirs, damped), rel=SAME_ERROR)
    best = solvers.reconstruct(weight, damped, theirs != 0)
    gap = ps2_answers.optimality_gap__right_schur(weight, damped, theirs, theirs != 0)
    assert gap > 1
    assert float(gap) == pytest.approx(error / solvers.layer_error(weight, best, damped), rel=SAME_ERROR)
