import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from sparselab.solvers import parse_sparsity, ria


def lowest_first(W, norm):
    """Every place with its score, written out."""
    rows, columns = W.abs().sum(dim=1).tolist(), W.abs().sum(dim=0).tolist()
    scored = []
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            size = abs(float(W[i, j]))
            scored.append(((size / columns[j] + size / rows[i]) * float(norm[j]) ** 0.5, i, j))
    return sorted(scored)


def test_prunes_the_lowest_scores_of_the_layer():
    W, _, H = layer(6, 10)
    norm = H.diagonal().sqrt()
    pruned = ria(W, norm, "40%")
    expected = W.clone()
    for _, i, j in lowest_first(W, norm)[:24]:
        expected[i, j] = 0
    assert torch.equal(pruned, expected)


def test_of_groups_it_prunes_the_lowest_of_each():
    W, _, H = layer(3, 8)
    norm = H.diagonal().sqrt()
    scores = {(i, j): score for score, i, j in lowest_first(W, norm)}
    pruned = ria(W, norm, "2:4")
    for i in range(3):
        for start in (0, 4):
            order = sorted(range(start, start + 4), key=lambda j, i=i: scores[i, j])
            assert [bool(pruned[i, j] == 0) for j in order] == [True, True, False, False]


@given(st.integers(1, 6), st.sampled_from([4, 8]), st.sampled_from(["0%", "30%", "100%", "2:4"]), st.integers(0, 5))
def test_counts_are_exact_and_what_stays_is_as_it_was(d_out, d_in, sparsity, seed):
    W, X, _ = layer(d_out, d_in, seed)
    pruned = ria(W, X.norm(dim=0), sparsity)
    kept = pruned != 0
    assert torch.equal(pruned[kept], W[kept])
    assert int((~kept).sum()) == round(parse_sparsity(sparsity).fraction * W.numel())


def test_rows_and_columns_of_zeros_and_dead_inputs_go_first():
    W, X, _ = layer(6, 8)
    W[0], W[:, 1], X[:, 2] = 0, 0, 0
    nothing_lost = torch.ones(6, 8, dtype=torch.bool)
    nothing_lost[0], nothing_lost[:, 1:3] = False, False
    pruned = ria(W, X.norm(dim=0), 18 / 48)
    assert torch.equal(pruned != 0, nothing_lost)


def test_bad_arguments():
    W, _, H = layer(3, 8)
    with pytest.raises(ValueError, match="feature_norm: expected norms ≥ 0"):
        ria(W, -H.diagonal(), "50%")
    with pytest.raises(ValueError, match="pattern 2:3: M must divide d_in"):
        ria(W, H.diagonal(), "2:3")
