import math

import pytest
import torch
from layers import layer

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers import InputStatistics, damped, factorise, layer_error, relative_error


def collected(*parts, **options) -> InputStatistics:
    statistics = InputStatistics(parts[0].shape[-1], **options)
    for part in parts:
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_raw_sums_whatever_the_batches(dtype):
    inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    uneven = collected(inputs[:7].view(1, 7, 8), inputs[7:9], inputs[9:].view(3, 17, 8))
    exact = inputs.double().T @ inputs.double()
    assert uneven.tokens == 60
    torch.testing.assert_close(uneven.hessian.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(uneven.feature_norm.double(), inputs.double().norm(dim=0), rtol=1e-5, atol=0)


def test_norms_alone_equal_those_of_the_whole_hessian():
    inputs = torch.randn(50, 6)
    few = collected(inputs, with_hessian=False)
    torch.testing.assert_close(few.feature_norm, collected(inputs).feature_norm)
    with pytest.raises(ValueError, match="with_hessian=True"):
        _ = few.hessian


def test_merged_parts_equal_the_whole():
    inputs = torch.randn(40, 5, dtype=torch.float64)
    left, right = (collected(part, dtype=torch.float64) for part in (inputs[:11], inputs[11:]))
    left.factor(0.01)
    left.merge(right)
    whole = collected(inputs, dtype=torch.float64)
    torch.testing.assert_close(left.hessian, whole.hessian)
    torch.testing.assert_close(left.factor(0.01).V, whole.factor(0.01).V)
    assert left.tokens == 40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_hessian", [True, False])
def test_bad_inputs_are_refused_and_not_added(bad, with_hessian):
    statistics = collected(torch.ones(3, 4), with_hessian=with_hessian)
    inputs = torch.ones(5, 4)
    inputs[2, 1] = bad
    with pytest.raises(NonFiniteError, match="inputs are NaN or infinite"):
        statistics.update(inputs)
    assert statistics.tokens == 3
    assert statistics.feature_norm.isfinite().all()


def test_low_precision_short_cuts_do_not_reach_the_sums():
    inputs = torch.randn(512, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = collected(inputs).hessian
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(allowed, collected(inputs).hessian)


def test_damping_adds_a_share_of_the_mean_diagonal_after_waking_dead_inputs():
    H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[4.2, 1.0, 0.0], [1.0, 1.2, 0.0], [0.0, 0.0, 1.2]])
    torch.testing.assert_close(damped(H, 0.1), expected)
    assert H[2, 2] == 0, "the argument is changed"
    for wrong in (-0.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="percdamp: expected a finite number"):
            damped(H, wrong)


def test_factor_identities():
    _, _, H = layer(1, 40)
    factor = factorise(H, 0.01)
    Hd = damped(H, 0.01)
    assert torch.equal(factor.V, factor.V.triu())
    torch.testing.assert_close(factor.V @ factor.V.T, Hd)
    U = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor.V), U)
    # U_qq² = [(H_{q:,q:})⁻¹]_qq: what makes one factor serve every column
    direct = torch.stack([torch.linalg.inv(Hd[q:, q:])[0, 0] for q in range(40)])
    torch.testing.assert_close(U.diagonal() ** 2, direct)
    torch.testing.assert_close(factor.V.diagonal() ** -2, direct)


def test_indefinite_after_damping_is_an_error_with_a_remedy():
    with pytest.raises(SingularHessianError, match="raise percdamp"):
        factorise(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01)
    with pytest.raises(NonFiniteError, match="Hessian"):
        factorise(torch.tensor([[math.nan]]), 0.01)


def test_layer_error_is_the_squared_error_of_the_outputs():
    W, X, H = layer(5, 12)
    P = W * (torch.arange(12) % 3 > 0)
    direct = (X @ (W - P).T).square().sum()
    assert layer_error(W, P, H) == pytest.approx(float(direct))
    assert relative_error(W, P, H) == pytest.approx(float(direct / (X @ W.T).square().sum()))
    assert relative_error(W, W, H) == 0
    assert math.isnan(relative_error(torch.zeros_like(W), W, H))
