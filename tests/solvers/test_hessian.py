import math

import numpy as np
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_sums_in_float32(dtype):
    inputs = (torch.randn(4096, 1100, device="cuda") + 0.5).to(dtype)
    seen, exact = collected(inputs[:1000], inputs[1000:], device="cuda"), inputs.double().T @ inputs.double()
    norms = exact.diagonal().sqrt()
    # Half precision goes through tensor cores, whose float32 sums are cut off rather than rounded.
    assert ((seen.hessian - exact).abs() / (norms[:, None] * norms)).max() < (1e-5 if dtype == torch.float32 else 2e-4)
    torch.testing.assert_close(seen.feature_norm.double(), norms, rtol=2e-4, atol=0)


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


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_short_cuts_do_not_reach_the_sums(device):
    inputs = torch.randn(512, 64, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = collected(inputs, device=device).hessian
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(allowed, collected(inputs, device=device).hessian)


@pytest.mark.parametrize("device", DEVICES)
def test_nor_do_those_of_a_single_library(device):
    inputs = torch.randn(512, 64, device=device)
    library = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    before, short = library.fp32_precision, "tf32" if device == "cuda" else "bf16"
    library.fp32_precision = short
    try:
        allowed = collected(inputs, device=device).hessian
        assert library.fp32_precision == short
    finally:
        library.fp32_precision = before
    assert torch.equal(allowed, collected(inputs, device=device).hessian)


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


@pytest.mark.usefixtures("untyped")
def test_statistics_take_only_what_fits():
    statistics = collected(torch.ones(3, 4))
    for wrong in (torch.ones(3, 5), torch.ones(3, 1), torch.ones(4), torch.ones(3, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"inputs: expected floats \[\.\.\., tokens, 4\], received"):
            statistics.update(wrong)
    with pytest.raises(TypeError, match="inputs: expected a tensor, received list"):
        statistics.update([[1.0] * 4])
    for other in (collected(torch.ones(3, 4), with_hessian=False), collected(torch.ones(3, 1))):
        for one, two in ((statistics, other), (other, statistics)):
            with pytest.raises(ValueError, match="other: expected sums of shape"):
                one.merge(two)
    assert statistics.tokens == 3
    assert (statistics.hessian == 3).all()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("take", [lambda H: damped(H, 0.01), lambda H: factorise(H, 0.01)], ids=["damped", "factorise"])
def test_only_square_float_matrices_are_hessians(take):
    eye = torch.eye(3)
    for wrong in (eye.long(), eye[0], eye.cfloat(), eye[:2], eye[None]):
        with pytest.raises(ValueError, match="hessian: expected"):
            take(wrong)
    for wrong in (None, eye.numpy(), eye.tolist()):
        with pytest.raises(TypeError, match="hessian: expected a tensor, received"):
            take(wrong)
    with pytest.raises(NonFiniteError, match="the Hessian has NaN"):
        take(eye * math.nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_hessians_are_worked_on_in_float32(dtype):
    half = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=dtype)
    assert damped(half, 0.1).dtype == factorise(half, 0.1).V.dtype == torch.float32
    assert torch.equal(damped(half, 0.1), damped(half.float(), 0.1))


@pytest.mark.usefixtures("untyped")
def test_damping_is_a_number_that_fits():
    H = torch.eye(3)
    with pytest.raises(
        NonFiniteError, match=r"percdamp 1e\+300, on a mean diagonal of 1, does not fit torch.float32; lower"
    ):
        factorise(H, 1e300)
    assert factorise(H.double(), 1e300).V.isfinite().all()
    with pytest.raises(ValueError, match="percdamp: expected a finite number"):
        damped(H, 10**400)
    for wrong in ("x", None, True, [0.1], torch.ones(2), np.ones(2)):
        with pytest.raises(TypeError, match="percdamp: expected a number"):
            collected(torch.ones(2, 3)).factor(wrong)
    for same in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(damped(H, same), damped(H, 0.5))


def test_an_error_that_is_no_number_is_not_silent():
    W = torch.full((2, 3), 1e25)
    for pruned, hessian in ((W * 0, torch.eye(3)), (W * math.nan, torch.eye(3)), (W * 0, torch.eye(3) * math.inf)):
        with pytest.raises(NonFiniteError, match="the outputs' squared error or energy is"):
            relative_error(W, pruned, hessian)
    assert relative_error(W.double(), W.double() * 0, torch.eye(3)) == 1, "float64 weights are not worked on in float32"


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("error", [layer_error, relative_error])
def test_errors_of_other_shapes_are_refused(error):
    W, H = torch.ones(2, 3), torch.eye(3)
    for wrong in ((W, W[:1], H), (W, W[:, :1], H), (W, W, H[:1, :1]), (W, W, H[0]), (W[0], W, H)):
        with pytest.raises(ValueError, match="expected"):
            error(*wrong)
    with pytest.raises(TypeError, match="pruned: expected a tensor, received ndarray"):
        error(W, W.numpy(), H)


def test_layer_error_is_the_squared_error_of_the_outputs():
    W, X, H = layer(5, 12)
    P = W * (torch.arange(12) % 3 > 0)
    direct = (X @ (W - P).T).square().sum()
    assert layer_error(W, P, H) == pytest.approx(float(direct))
    assert relative_error(W, P, H) == pytest.approx(float(direct / (X @ W.T).square().sum()))
    assert relative_error(W, W, H) == 0
    assert math.isnan(relative_error(torch.zeros_like(W), W, H))


def test_sums_wider_than_a_panel_read_and_added_to_in_any_order():
    X = torch.randn(40, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (InputStatistics(300, dtype=torch.float64) for _ in range(2))
    one.update(X[:10])
    torch.testing.assert_close(one.hessian, X[:10].T @ X[:10])  # fills in the lower half
    one.update(X[10:15])
    torch.testing.assert_close(one.hessian, X[:15].T @ X[:15])
    other.update(X[15:])
    one.merge(other)  # whose lower half is empty
    torch.testing.assert_close(one.hessian, X.T @ X)
    torch.testing.assert_close(one.feature_norm, X.norm(dim=0))
    assert one.tokens == 40


def test_inputs_too_large_for_the_sums_change_nothing():
    seen = InputStatistics(4)
    seen.update(torch.ones(2, 4))
    for wrong in (math.nan, math.inf, -math.inf, 1e19):
        with pytest.raises(NonFiniteError, match="NaN or infinite, or too large"):
            seen.update(torch.full((4, 4), wrong))
    assert torch.equal(seen.hessian, torch.full((4, 4), 2.0))
    assert seen.tokens == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wider", [1, 2, 8])
def test_a_factor_of_several_panels(device, wider, monkeypatch):
    monkeypatch.setattr("sparselab.solvers.hessian._panel_width", lambda _: wider * 128)
    H = layer(1, 300)[2].to(device)
    factor = factorise(H, 0.01)
    torch.testing.assert_close(factor.V @ factor.V.T, damped(H, 0.01))
    assert torch.equal(factor.V, factor.V.triu())
    for blocksize in (128, 100, 300):
        for start, U in zip(range(0, 300, blocksize), factor.inverses(blocksize), strict=True):
            corner = factor.V[start : start + blocksize, start : start + blocksize]
            torch.testing.assert_close(U @ corner, torch.eye(len(U), dtype=H.dtype, device=device))


@pytest.mark.parametrize("place", [(5, 5), (2, 250), (140, 141)])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_one_broken_entry_of_the_upper_half_is_enough(place, broken, device):
    H = layer(1, 300)[2].to(device)
    H[place] = broken
    with pytest.raises(NonFiniteError, match="the Hessian has NaN"):
        factorise(H, 0.01)
