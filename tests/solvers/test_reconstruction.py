import math

import pytest
import torch
from layers import layer

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers import damped, layer_error, reconstruct, sparsegpt


@pytest.mark.parametrize("shape", [(6, 10), (1, 12), (5, 1)])
def test_equals_least_squares_on_the_inputs(shape):
    W, X, H = layer(*shape)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    best = reconstruct(W, H, keep)
    for row, (w, k) in enumerate(zip(W, keep, strict=True)):
        brute = torch.zeros(shape[1], dtype=torch.float64)
        if k.any():
            brute[k] = torch.linalg.lstsq(X[:, k], X @ w).solution
        torch.testing.assert_close(best[row], brute, rtol=1e-8, atol=1e-8)


def test_rows_in_pieces_give_the_same(monkeypatch):
    W, _, H = layer(9, 16)
    keep = torch.rand(9, 16) > 0.5
    whole = reconstruct(W, H, keep)
    monkeypatch.setattr("sparselab.solvers.reconstruction._ELEMENTS_AT_ONCE", 300)
    torch.testing.assert_close(reconstruct(W, H, keep), whole)


def test_never_worse_than_the_sweep_on_the_damped_problem():
    W, _, H = layer(24, 48)
    P = sparsegpt(W, H, "2:4")
    Hd = damped(H, 0.01)
    assert layer_error(W, reconstruct(W, Hd, P != 0), Hd) < layer_error(W, P, Hd)


def test_everything_kept_and_dead_inputs_stay():
    W, X, _ = layer(3, 8)
    X[:, 2] = 0
    torch.testing.assert_close(reconstruct(W, X.T @ X, torch.ones(3, 8, dtype=torch.bool)), W)


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    W, _, H = layer(3, 8)
    keep = torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(NonFiniteError, match="the Hessian has NaN"):
        reconstruct(W, H * math.nan, keep)
    with pytest.raises(TypeError, match=r"keep: expected a mask of torch\.bool, received torch\.int64"):
        reconstruct(W, H, keep.long())
    with pytest.raises(TypeError, match="hessian: expected a tensor, received ndarray"):
        reconstruct(W, H.numpy(), keep)
    assert not reconstruct(torch.nn.Parameter(W), torch.nn.Parameter(H), keep).requires_grad


def test_a_result_that_does_not_fit_the_dtype_is_an_error():
    W = torch.full((1, 2), 6e4).half()
    with pytest.raises(NonFiniteError, match=r"does not fit torch\.float16; raise percdamp, or load"):
        reconstruct(W, torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[True, False]]))


def test_no_unique_optimum_is_an_error():
    W, X, _ = layer(3, 8)
    X[:, 5] = X[:, 4]
    with pytest.raises(SingularHessianError, match="damped"):
        reconstruct(W, X.T @ X - 1e-9 * torch.eye(8), torch.ones(3, 8, dtype=torch.bool))
