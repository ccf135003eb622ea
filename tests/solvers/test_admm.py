import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers import NM, admm, damped, layer_error, parse_sparsity, reconstruct, sparsegpt, wanda


def as_written(W, H, sparsity, lam=0.01, iterations=20):
    """The method as the paper's page of equations has it, weights transposed, one loop after the other."""
    pattern = parse_sparsity(sparsity)
    d_in, d_out = W.shape[1], W.shape[0]
    s = H.diagonal().sqrt()
    G = H / torch.outer(s, s)
    G = G + lam * G.diagonal().mean() * torch.eye(d_in, dtype=W.dtype)
    B = (W * s).T
    K = torch.linalg.inv(G + torch.eye(d_in, dtype=W.dtype))
    C, V, U, M = G @ B, B.clone(), torch.zeros_like(B), torch.ones_like(B)
    settled = round(0.75 * iterations)
    for t in range(1, iterations + 1):
        if t <= settled:
            share = 1 - (1 - t / settled) ** 3
            scores = (V + U).abs().T.tolist()  # rows of W again
            places = [(i, j) for i in range(d_out) for j in range(d_in)]
            if isinstance(pattern, NM):
                places = []
                for i in range(d_out):
                    for start in range(0, d_in, pattern.group):
                        group = sorted(range(start, start + pattern.group), key=lambda j, i=i: scores[i][j])
                        places += [(i, j) for j in group[: pattern.group - pattern.kept]]
            places.sort(key=lambda place: scores[place[0]][place[1]])
            M = torch.ones_like(B)
            for i, j in places[: round(share * round(pattern.fraction * d_out * d_in))]:
                M[j, i] = 0
        Z = M * (V + U)
        U = U + V - Z
        V = K @ (C + Z - U)
    return (M * (V + U)).T / s


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "1:4"])
@pytest.mark.parametrize("iterations", [1, 4, 20])
def test_equals_the_method_as_it_is_written(sparsity, iterations):
    W, _, H = layer(6, 16)
    expected = as_written(W, H, sparsity, iterations=iterations)
    torch.testing.assert_close(admm(W, H, sparsity, 0.01, iterations), expected, rtol=1e-9, atol=1e-12)


PATTERNS = st.sampled_from(["0%", "35%", "50%", "100%", "2:4", "1:4"])


@given(st.integers(1, 8), st.sampled_from([4, 8, 12]), PATTERNS, st.integers(0, 9))
def test_counts_are_exact_and_arguments_stay(d_out, d_in, sparsity, seed):
    W, _, H = layer(d_out, d_in, seed)
    before = W.clone(), H.clone()
    pruned = admm(W, H, sparsity)
    pattern = parse_sparsity(sparsity)
    assert int((pruned == 0).sum()) == round(pattern.fraction * W.numel())
    if isinstance(pattern, NM):
        assert ((pruned.view(d_out, -1, pattern.group) != 0).sum(dim=-1) == pattern.kept).all()
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    if pattern.fraction == 0:
        assert torch.equal(pruned, W)


def test_comes_close_to_the_optimum_of_its_mask_and_is_better_than_the_others():
    W, _, H = layer(32, 64)
    pruned = admm(W, H, "60%", percdamp=0.0)
    best = reconstruct(W, damped(H, 0.0), pruned != 0)
    error = layer_error(W, pruned, H)
    assert layer_error(W, best, H) <= error <= 1.02 * layer_error(W, best, H)
    assert error < layer_error(W, sparsegpt(W, H, "60%"), H)
    assert error < layer_error(W, wanda(W, H.diagonal().sqrt(), "60%"), H)


def test_more_iterations_lower_the_error():
    W, _, H = layer(24, 48)
    errors = [layer_error(W, admm(W, H, "60%", iterations=count), H) for count in (1, 3, 20)]
    assert errors == sorted(errors, reverse=True)


def test_the_scale_of_the_inputs_does_not_matter_and_dead_inputs_go_first():
    W, X, _ = layer(8, 12)
    X[:, 3] = 0
    H = X.T @ X
    pruned = admm(W, H, "50%")
    assert (pruned[:, 3] == 0).all()
    torch.testing.assert_close(admm(W, 1e-8 * H, "50%"), pruned)


def test_half_precision_weights_keep_their_dtype():
    W, _, H = layer(8, 12)
    pruned = admm(W.bfloat16(), H.float(), "50%")
    assert pruned.dtype == torch.bfloat16
    assert int((pruned == 0).sum()) == 48


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    W, _, H = layer(4, 8)
    with pytest.raises(ValueError, match="iterations: expected at least 1, received 0"):
        admm(W, H, "50%", iterations=0)
    with pytest.raises(ValueError, match="pattern 2:3: M must divide d_in"):
        admm(W, H, "2:3")
    with pytest.raises(ValueError, match=r"hessian: expected shape \(8, 8\)"):
        admm(W, H[:4, :4], "50%")
    with pytest.raises(NonFiniteError, match="the weight has NaN"):
        admm(W * math.nan, H, "50%")
    with pytest.raises(SingularHessianError, match="not positive definite"):
        admm(W, torch.eye(8, dtype=torch.float64) + 3 * (1 - torch.eye(8, dtype=torch.float64)), "50%")
