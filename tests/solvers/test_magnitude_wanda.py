import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from sparselab.errors import NonFiniteError
from sparselab.solvers import magnitude, relative_error, wanda
from sparselab.solvers.checks import all_finite

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
def test_magnitude_prunes_the_smallest_of_the_layer(d_out, d_in, sparsity, seed):
    W = torch.randint(-3, 4, (d_out, d_in), generator=torch.Generator().manual_seed(seed)).float()
    P = magnitude(W, sparsity)
    flat = W.abs().flatten().tolist()
    gone = sorted(range(len(flat)), key=lambda k: (flat[k], k))[: round(sparsity * len(flat))]
    expected = W.flatten().clone()
    expected[gone] = 0
    assert torch.equal(P.flatten(), expected)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
def test_wanda_prunes_exactly_round_of_every_row(d_out, d_in, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator)
    norm = torch.rand(d_in, generator=generator)
    P = wanda(W, norm, sparsity)
    for w, p in zip(W, P, strict=True):
        scores = (w.abs() * norm).tolist()
        gone = sorted(range(d_in), key=lambda k: (scores[k], k))[: round(sparsity * d_in)]
        assert p.count_nonzero() == d_in - len(gone)
        assert torch.equal(p == 0, torch.tensor([k in gone for k in range(d_in)]))


def test_wanda_with_equal_norms_is_magnitude_within_rows():
    W = torch.randn(6, 20)
    P = wanda(W, torch.full((20,), 3.0), 0.45)
    assert torch.equal(P, torch.cat([magnitude(row[None], 0.45) for row in W]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", ["50%", "2:4", "1:4"])
def test_dtype_and_argument_stay(dtype, sparsity):
    W = torch.randn(8, 16).to(dtype)
    before = W.clone()
    for P in (magnitude(W, sparsity), wanda(W, torch.rand(16) + 0.1, sparsity)):
        assert P.dtype == dtype
        assert torch.equal(W, before)
        assert not P[P == 0].signbit().any(), "negative zeros"


def test_extremes_and_dead_inputs():
    W = torch.randn(4, 8)
    norm = torch.ones(8)
    norm[3] = 0
    assert torch.equal(magnitude(W, 0), W)
    assert torch.equal(wanda(W, norm, 0), W)
    assert not magnitude(W, 1).any()
    assert not wanda(W, norm, 1).any()
    assert not wanda(W, norm, 1 / 8)[:, 3].any(), "a dead input goes first"


def test_float64_weights_are_compared_in_float64():
    W = 1 + 1e-12 * torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[True, False, True, False]])
    assert torch.equal(magnitude(W, 0.5) != 0, expected)
    assert torch.equal(wanda(W, torch.ones(4), 0.5) != 0, expected)


@pytest.mark.usefixtures("untyped")
def test_arguments_that_are_no_tensors_are_named():
    W, norm = torch.randn(2, 4), torch.ones(4)
    for wrong in (None, W.numpy(), W.tolist()):
        with pytest.raises(TypeError, match="weight: expected a tensor, received"):
            magnitude(wrong, 0.5)
        with pytest.raises(TypeError, match="weight: expected a tensor, received"):
            wanda(wrong, norm, 0.5)
        with pytest.raises(TypeError, match="feature_norm: expected a tensor, received"):
            wanda(W, wrong, 0.5)
    with pytest.raises(ValueError, match="feature_norm: expected norms ≥ 0, received -1"):
        wanda(W, -norm, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_entry_anywhere_is_found(dtype):
    W = torch.randn(3, 5).to(dtype)
    assert all_finite(W)
    assert all_finite(W[:0])
    for place in range(W.numel()):
        for bad in (math.nan, math.inf, -math.inf):
            damaged = W.clone()
            damaged.view(-1)[place] = bad
            assert not all_finite(damaged)
            assert not all_finite(damaged.T)


def test_parameters_serve_and_record_nothing():
    W = torch.nn.Parameter(torch.randn(2, 4))
    for P in (magnitude(W, 0.5), wanda(W, torch.nn.Parameter(torch.ones(4)), 0.5)):
        assert not P.requires_grad


def test_wanda_knows_the_inputs_and_magnitude_does_not():
    W, _, H = layer(32, 64)
    scale = torch.linspace(0.1, 3, 64, dtype=torch.float64)
    H = H * scale[:, None] * scale
    assert relative_error(W, wanda(W, H.diagonal().sqrt(), 0.5), H) < relative_error(W, magnitude(W, 0.5), H)


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    W = torch.randn(4, 6)
    with pytest.raises(ValueError, match="feature_norm: expected 6 norms"):
        wanda(W, torch.ones(5), 0.5)
    with pytest.raises(NonFiniteError, match="feature_norm"):
        wanda(W, torch.full((6,), math.nan), 0.5)
    with pytest.raises(ValueError, match="M must divide d_in"):
        magnitude(W, "2:4")
    for broken in (math.nan, math.inf):
        damaged = W.clone()
        damaged[1, 2] = broken
        with pytest.raises(NonFiniteError, match="weight"):
            magnitude(damaged, 0.5)
    with pytest.raises(ValueError, match="float matrix"):
        magnitude(torch.ones(4), 0.5)
