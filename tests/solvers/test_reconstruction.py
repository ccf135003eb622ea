import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers import damped, layer_error, magnitude, reconstruct, refine, sparsegpt


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


@pytest.mark.parametrize("shape", [(6, 10), (1, 12), (24, 48), (5, 1)])
def test_refined_to_the_end_is_the_optimum(shape):
    W, _, H = layer(*shape)
    H = damped(H, 0.01)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    refined = refine(W, H, keep, steps=10 * shape[1])
    torch.testing.assert_close(refined.weight, reconstruct(W, H, keep), rtol=1e-8, atol=1e-10)
    assert refined.residual < 1e-12


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.integers(0, 30))
def test_refined_errors_lie_between_the_optimum_and_the_unrefined(d_out, d_in, seed, steps):
    W, _, H = layer(d_out, d_in, seed, tokens=2 + seed % (2 * d_in))
    H = damped(H, 0.01)
    keep = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) > 0.4
    best = layer_error(W, reconstruct(W, H, keep), H)
    for start in (None, sparsegpt(W, H, 0.5, keep=keep)):
        unrefined = layer_error(W, W * keep if start is None else start, H)
        refined = refine(W, H, keep, start, steps).weight
        assert not refined[~keep].any()
        assert best * (1 - 1e-9) - 1e-12 <= layer_error(W, refined, H) <= unrefined * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_steps_do_better_and_rounding_does_not_undo_them(dtype):
    W, _, H = layer(32, 64)
    H, W = damped(H, 0.01), W.to(dtype)
    keep = magnitude(W, 0.6) != 0
    least = layer_error(W, reconstruct(W, H, keep), H)
    errors = [layer_error(W, refine(W, H.float(), keep, steps=steps).weight, H) / least for steps in (0, 2, 5, 20, 200)]
    assert errors == sorted(errors, reverse=True) or dtype == torch.bfloat16
    assert errors[0] > 1.5 > errors[2]
    assert errors[-1] < (1.001 if dtype == torch.float32 else 1.01)


def test_residuals_say_how_far_it_is():
    W, _, H = layer(8, 32)
    H, keep = damped(H, 0.01), magnitude(W, 0.5) != 0
    residuals = [refine(W, H, keep, steps=steps).residual for steps in (0, 5, 20, 100)]
    assert residuals == sorted(residuals, reverse=True)
    gradient = (W @ H) * keep
    assert residuals[0] == pytest.approx(float((((W - W * keep) @ H) * keep).norm() / gradient.norm()))
    assert refine(W, H, torch.zeros_like(keep)).residual == 0


@pytest.mark.parametrize("tolerance", [0.1, 1e-4])
def test_it_stops_once_ten_steps_lower_the_error_by_no_more_than_the_tolerance(tolerance):
    W, _, H = layer(24, 48)
    H, keep = damped(H, 0.01), magnitude(W, 0.5) != 0
    errors = [layer_error(W, refine(W, H, keep, steps=steps).weight, H) for steps in range(80)]
    first = next(
        step for step in range(10, 80) if errors[step - 10] - errors[step] <= tolerance * errors[step] * (1 + 1e-9)
    )
    assert first > 10
    stopped = refine(W, H, keep, steps=79, tolerance=tolerance).weight
    assert torch.equal(stopped, refine(W, H, keep, steps=first).weight)
    fewer = refine(W, H, keep, steps=first - 1, tolerance=tolerance).weight
    assert torch.equal(fewer, refine(W, H, keep, steps=first - 1).weight), "steps are the limit"


def test_it_stops_where_nothing_is_left(monkeypatch):
    W, _, H = layer(4, 32, tokens=8)  # so few tokens that the kept weights can do without the others
    keep = magnitude(W, 0.5) != 0
    products = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(1) or torch.matmul(a, b))
    refined = refine(W, H, keep, steps=1000, tolerance=1e-3)
    assert len(products) < 30
    assert layer_error(W, refined.weight, H) < 1e-12 * layer_error(W, W * keep, H)
    assert refine(W, H, torch.ones_like(keep), steps=1000, tolerance=1e-3).residual == 0, "nothing to lower"


@pytest.mark.usefixtures("untyped")
def test_refine_leaves_its_arguments_and_refuses_what_makes_no_sense():
    W, _, H = layer(3, 8)
    keep, given = torch.ones(3, 8, dtype=torch.bool), (W.clone(), H.clone())
    refine(W, H, keep)
    assert (torch.equal(W, given[0]), torch.equal(H, given[1])) == (True, True)
    with pytest.raises(ValueError, match="steps: expected at least 0, received -1"):
        refine(W, H, keep, steps=-1)
    for tolerance in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"tolerance: expected a finite number ≥ 0, received {tolerance}"):
            refine(W, H, keep, tolerance=tolerance)
    with pytest.raises(TypeError, match="tolerance: expected a number, received str"):
        refine(W, H, keep, tolerance="low")
    with pytest.raises(TypeError, match=r"keep: expected a mask of torch\.bool"):
        refine(W, H, keep.float())
