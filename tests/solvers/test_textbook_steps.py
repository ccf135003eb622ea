"""The textbook sweep column by column: against the oracle, the mathematics it teaches, and its own end."""

import math

import pytest
import torch
from layers import layer, oracle

from sparselab import solvers
from sparselab.solvers import damped, layer_error, reconstruct, sparsegpt, sparsegpt_textbook, textbook_steps

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
PATTERNS = ["50%", "70%", "2:4", "1:4", 0.0, 1.0]


def so_far(step):
    """The mask of the columns done; those after it are kept."""
    keep = step.keep.clone()
    keep[:, step.column + 1 :] = True
    return keep


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_every_step_is_the_oracles_for_the_mask_so_far(sparsity):
    W, _, H = layer(6, 16)
    steps = list(textbook_steps(W, H, sparsity, 0.01, blocksize=8))
    assert [step.column for step in steps] == list(range(16))
    for step in steps:
        torch.testing.assert_close(step.weight, oracle(W, H, 0.5, keep=so_far(step)), **CLOSE)
    torch.testing.assert_close(steps[-1].weight, oracle(W, H, sparsity, blocksize=8), **CLOSE)


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_the_last_step_is_the_result_of_all_paths(sparsity):
    W, _, H = layer(6, 16)
    *_, last = steps = list(textbook_steps(W, H, sparsity, 0.1, blocksize=8))
    textbook, errors = sparsegpt_textbook(W, H, sparsity, 0.1, blocksize=8)
    assert torch.equal(last.weight, textbook)
    assert torch.equal(torch.stack([step.errors for step in steps], dim=1), errors)
    torch.testing.assert_close(last.weight, sparsegpt(W, H, sparsity, 0.1, blocksize=8), **CLOSE)
    assert not last.weight[~last.keep].any()


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_a_step_changes_its_own_column_and_moves_the_rest_by_its_compensation(sparsity):
    W, _, H = layer(5, 12)
    before = W
    for step in textbook_steps(W, H, sparsity, blocksize=4):
        q = step.column
        assert torch.equal(step.weight[:, :q], before[:, :q]), "columns done stay"
        assert not step.compensation[:, : q + 1].any()
        torch.testing.assert_close(step.weight[:, q + 1 :] - before[:, q + 1 :], step.compensation[:, q + 1 :])
        assert torch.equal(step.weight[:, q], before[:, q] * step.keep[:, q])
        assert torch.equal(step.compensation.any(dim=1), ~step.keep[:, q] & torch.tensor(q < 11))
        before = step.weight


def test_squared_errors_so_far_are_the_damped_layer_error_and_never_below_the_optimum():
    W, _, H = layer(5, 12)
    D, total, gaps = damped(H, 0.01), 0.0, []
    for step in textbook_steps(W, H, "50%", blocksize=6):
        total += float(step.errors.square().sum())
        assert layer_error(W, step.weight, D) == pytest.approx(total, rel=1e-9)
        gaps.append(total - layer_error(W, reconstruct(W, D, so_far(step)), D))
    assert min(gaps) > -1e-9
    assert gaps[0] == pytest.approx(0, abs=1e-9), "one column: nothing is frozen yet, so the sweep is optimal"
    assert gaps[-1] > 1e-3


@pytest.mark.parametrize(("sparsity", "blocksize", "width"), [("50%", 8, 8), ("50%", 5, 5), ("2:4", 8, 4)])
def test_scores_are_those_of_the_group_when_it_competes(sparsity, blocksize, width):
    W, _, H = layer(5, 16)
    D, before = damped(H, 0.01), W
    for step in textbook_steps(W, H, sparsity, blocksize=blocksize):
        assert step.start == step.column // width * width
        stop = min(step.start + width, 16)
        if step.column == step.start:
            losses = [1 / torch.linalg.inv(D[q:, q:])[0, 0] for q in range(step.start, stop)]
            expected = before[:, step.start : stop] ** 2 * torch.stack(losses)
        torch.testing.assert_close(step.scores, expected)
        assert step.keep[:, stop:].all(), "not yet decided"
        before = step.weight


def test_keep_is_used_as_it_is_and_nothing_given_is_changed():
    W, _, H = layer(4, 8)
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    before = W.clone(), H.clone(), keep.clone()
    steps = list(textbook_steps(W, H, 0.9, keep=keep))
    assert torch.equal(steps[-1].weight != 0, keep)
    assert all(torch.equal(step.keep, keep) for step in steps)
    list(textbook_steps(W, H, 0.9))
    assert all(torch.equal(*pair) for pair in zip((W, H, keep), before, strict=True))


def test_steps_kept_are_not_changed_by_later_ones():
    W, _, H = layer(4, 12)
    at_once = [step.weight.clone() for step in textbook_steps(W, H, "50%", blocksize=4)]
    masks = [step.keep.clone() for step in textbook_steps(W, H, "50%", blocksize=4)]
    for step, weight, mask in zip(list(textbook_steps(W, H, "50%", blocksize=4)), at_once, masks, strict=True):
        assert torch.equal(step.weight, weight)
        assert torch.equal(step.keep, mask)


def test_a_dead_input_scores_zero_and_compensates_nothing():
    W, X, _ = layer(4, 8)
    X[:, 3] = 0
    steps = list(textbook_steps(W, X.T @ X, 1 / 8, percdamp=0.0))
    assert not steps[0].scores[:, 3].any()
    assert not steps[-1].weight[:, 3].any()
    assert not steps[3].compensation.any()


@pytest.mark.usefixtures("untyped")
def test_bad_arguments_are_refused_at_the_call():
    W, _, H = layer(4, 8)
    with pytest.raises(ValueError, match="expected"):
        textbook_steps(W, H, "most")
    with pytest.raises(ValueError, match="percdamp"):
        textbook_steps(W, H, 0.5, math.nan)
    with pytest.raises(ValueError, match="hessian: expected shape"):
        textbook_steps(W, H[:3, :3], 0.5)


@pytest.mark.parametrize("percdamp", [0.0, 0.01, 0.5])
def test_the_factors_say_of_the_remaining_hessian_what_the_notebook_teaches(percdamp):
    _, _, H = layer(2, 10)
    D, V = damped(H, percdamp), solvers.factorise(H, percdamp).V
    U = torch.linalg.cholesky(torch.linalg.inv(D), upper=True)
    torch.testing.assert_close(U, torch.linalg.inv(V))
    for q in range(10):
        remaining = torch.linalg.inv(D[q:, q:])
        torch.testing.assert_close(U[q, q:] * U[q, q], remaining[0])
        assert 1 / torch.linalg.inv(D)[q, q] <= V[q, q] ** 2 * (1 + 1e-9)
        assert V[q, q] ** 2 <= D[q, q] * (1 + 1e-9)
