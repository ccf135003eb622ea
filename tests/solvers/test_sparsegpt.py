import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SAME_ERROR, layer, oracle

from sparselab.errors import NonFiniteError, SingularHessianError
from sparselab.solvers import (
    Unstructured,
    damped,
    factorise,
    layer_error,
    least_flop,
    magnitude,
    realised_sparsity,
    reconstruct,
    relative_error,
    sparsegpt,
    sparsegpt_textbook,
    sweep,
    sweep_together,
    wanda,
)

SHAPES = {"square": (40, 40), "tall": (90, 24), "wide": (12, 72), "one row": (1, 30), "one column": (9, 1)}
PATTERNS = ["50%", "70%", "2:4", "1:4", "3:6", "0.01"]


@pytest.mark.parametrize("percdamp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    ("shape", "sparsity"),
    [
        pytest.param(shape, sparsity, id=f"{name} {sparsity}")
        for name, shape in SHAPES.items()
        for sparsity in PATTERNS
        if ":" not in sparsity or shape[1] % int(sparsity[-1]) == 0
    ],
)
def test_fast_textbook_and_oracle_agree(shape, sparsity, percdamp):
    group = int(sparsity[-1]) if ":" in sparsity else 1
    W, _, H = layer(*shape)
    blocksize = 4 * group if group > 1 else 16  # narrower than d_in, and ragged for some
    expected = oracle(W, H, sparsity, percdamp, blocksize)
    torch.testing.assert_close(sparsegpt(W, H, sparsity, percdamp, blocksize), expected, rtol=1e-7, atol=1e-9)
    textbook, errors = sparsegpt_textbook(W, H, sparsity, percdamp, blocksize)
    torch.testing.assert_close(textbook, expected, rtol=1e-7, atol=1e-9)
    # The published code's losses: Σ((w−ŵ)/U_qq)² is the layer error under the damped Hessian.
    loss = layer_error(W, textbook, damped(H, percdamp))
    assert float(errors.square().sum()) == pytest.approx(loss, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(512, 512), (1024, 256), (256, 1024)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_float32_layer_errors_equal_the_textbook_sweeps(shape, sparsity):
    W, _, H = layer(*shape)
    fast = relative_error(W, sparsegpt(W.float(), H.float(), sparsity).double(), H)
    exact = relative_error(W, sparsegpt_textbook(W, H, sparsity)[0], H)
    assert fast == pytest.approx(exact, rel=SAME_ERROR)


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 6), d_in=st.integers(1, 40), tokens=st.integers(1, 60), blocksize=st.integers(1, 50),
    sparsity=st.floats(0, 1), zeros=st.floats(0, 1), dead=st.floats(0, 0.5), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_exact_counts_whatever_the_layer(d_out, d_in, tokens, blocksize, sparsity, zeros, dead, seed):
    """Ties, zeros, dead inputs, fewer tokens than inputs, one row, one column, ragged blocks."""
    W, X, _ = layer(d_out, d_in, seed, tokens)
    draw = torch.Generator().manual_seed(seed)
    X = X * (torch.rand(d_in, generator=draw) >= dead)
    W = torch.where(torch.rand(W.shape, generator=draw) < zeros, torch.zeros(()), W.round().clamp(-1, 1) + 0.5).double()
    H = (X.T @ X).float()
    before = W.clone(), H.clone()
    full = W == 0
    P = sparsegpt(W.float(), H, sparsity, percdamp=0.1, blocksize=blocksize)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    for start in range(0, d_in, blocksize):
        stop = min(start + blocksize, d_in)
        count = round(sparsity * d_out * (stop - start))
        pruned = int((P[:, start:stop] == 0).sum())
        # A kept weight may happen to be zero, and only where it was: compensation moves the others.
        assert count <= pruned <= count + int(full[:, start:stop].sum())


@given(st.integers(1, 8), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_n_m_holds_in_every_group(d_out, counts, seed):
    kept, group = counts
    W, _, H = layer(d_out, 4 * group, seed)
    P = sparsegpt(W, H, f"{kept}:{group}", blocksize=2 * group)
    assert torch.equal((P.view(d_out, 4, group) != 0).sum(-1), torch.full((d_out, 4), kept))


def test_zero_changes_nothing_and_one_leaves_nothing():
    W, _, H = layer(7, 30)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(sparsegpt(W.to(dtype), H.float(), 0), W.to(dtype))
        assert not sparsegpt(W.to(dtype), H.float(), 1).any()
    W, _, H = layer(7, 28)
    assert torch.equal(sparsegpt(W, H, "4:4"), W)
    assert not sparsegpt(W, H, "0:4").any()


@pytest.mark.parametrize("blocksize", [1, 7, 32, 33, 128])
def test_blocksize_changes_nothing_for_a_fixed_mask(blocksize):
    W, _, H = layer(20, 70)
    keep = torch.rand(20, 70, generator=torch.Generator().manual_seed(3)) > 0.6
    expected = oracle(W, H, 0.5, keep=keep.clone())
    given_mask = sparsegpt(W, H, 0.5, blocksize=blocksize, keep=keep)
    torch.testing.assert_close(given_mask, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(given_mask != 0, keep)


def test_its_own_mask_given_back_gives_the_same_weights():
    W, _, H = layer(16, 64)
    P = sparsegpt(W, H, "2:4")
    torch.testing.assert_close(sparsegpt(W, H, 0.9, keep=P != 0), P)


def test_the_scale_of_the_hessian_does_not_matter():
    W, _, H = layer(16, 64)
    torch.testing.assert_close(sparsegpt(W, 1000 * H, 0.5), sparsegpt(W, H, 0.5))


def test_better_than_wanda_better_than_magnitude_and_above_the_optimum():
    W, _, H = layer(64, 96)
    scale = torch.linspace(0.1, 3, 96, dtype=torch.float64)
    H = H * scale[:, None] * scale
    ours = sparsegpt(W, H, 0.6)
    errors = [relative_error(W, P, H) for P in (ours, wanda(W, H.diagonal().sqrt(), 0.6), magnitude(W, 0.6))]
    assert errors == sorted(errors)
    assert relative_error(W, reconstruct(W, H, ours != 0), H) < errors[0]


def test_dead_inputs_go_first_and_harm_nobody():
    W, X, _ = layer(10, 40)
    X[:, [3, 17, 31]] = 0
    H = X.T @ X
    P = sparsegpt(W, H, 3 / 40)
    assert not P[:, [3, 17, 31]].any()
    alive = [j for j in range(40) if j not in (3, 17, 31)]
    assert torch.equal(P[:, alive], W[:, alive]), "nothing had to be compensated"
    assert torch.equal(oracle(W, H, "50%", blocksize=16) == 0, sparsegpt(W, H, "50%", blocksize=16) == 0)


def test_no_information_at_all():
    W = torch.randn(5, 8)
    P = sparsegpt(W, torch.zeros(8, 8), 0.5)
    assert realised_sparsity(P) == 0.5
    assert torch.equal(P[P != 0], W[P != 0])


def test_layers_that_share_inputs_share_the_factor():
    W, _, H = layer(12, 32)
    factor = factorise(H, 0.01)
    for rows in (W[:5], W[5:]):
        torch.testing.assert_close(sweep(rows, factor, Unstructured(0.5)), sparsegpt(rows, H, 0.5))


@pytest.mark.parametrize(
    ("sparsity", "blocksize"), [("50%", 100), ("30%", 128), ("50%", 200), ("50%", 600), ("8:25", 50)]
)
def test_panels_and_blocks_of_any_width(sparsity, blocksize):
    W, _, H = layer(6, 650)
    expected, _ = sparsegpt_textbook(W, H, sparsity, blocksize=blocksize)
    torch.testing.assert_close(sparsegpt(W, H, sparsity, blocksize=blocksize), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("untyped")
def test_layers_swept_together_are_of_one_kind():
    W, _, H = layer(4, 8)
    factor = factorise(H, 0.01)
    for wrong in ([W, W.float()], []):
        with pytest.raises(ValueError, match="weights: expected some of one dtype and device, received"):
            sweep_together(wrong, factor, 0.5)


def test_layers_are_swept_together_as_they_would_be_alone():
    W, _, H = layer(24, 600)
    factor, parts = factorise(H, 0.01), [W[:5], W[5:6], W[6:]]
    masks = list((torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4).split([5, 1, 18]))
    for pattern, keep in (("30%", None), ("2:4", None), ("50%", masks)):
        together = sweep_together(parts, factor, pattern, 64, keep)
        alone = [sweep(part, factor, pattern, 64, keep and keep[k]) for k, part in enumerate(parts)]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other)
            assert torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_float32_keeps_the_float64_mask_and_error(sparsity):
    W, _, H = layer(256, 768)
    fast, (exact, _) = sparsegpt(W.float(), H.float(), sparsity).double(), sparsegpt_textbook(W, H, sparsity)
    assert relative_error(W, fast, H) == pytest.approx(relative_error(W, exact, H), rel=SAME_ERROR)
    assert ((fast == 0) == (exact == 0)).double().mean() > 0.995


def test_rounding_to_a_short_dtype_is_made_good_by_later_columns():
    W, _, H = layer(64, 256)
    short, keep = W.bfloat16(), sparsegpt(W, H, 0.5) != 0

    def error(pruned):
        return relative_error(short.double(), pruned.double(), damped(H, 0.01))

    at_the_end = error(sparsegpt(short.double(), H, 0.5, keep=keep).bfloat16())
    block_by_block, column_by_column = (error(sparsegpt(short, H, 0.5, blocksize=size, keep=keep)) for size in (16, 1))
    assert column_by_column < block_by_block < at_the_end


def test_repeats_bit_for_bit():
    W, _, H = layer(64, 160)
    assert torch.equal(sparsegpt(W.float(), H.float(), 0.5), sparsegpt(W.float(), H.float(), 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_gpu_gives_the_cpus_layer_error(sparsity):
    W, _, H = layer(256, 256)
    on_gpu = sparsegpt(W.float().cuda(), H.float().cuda(), sparsity).cpu().double()
    assert relative_error(W, on_gpu, H) == pytest.approx(
        relative_error(W, sparsegpt(W, H, sparsity), H), rel=SAME_ERROR
    )


@pytest.mark.parametrize("solver", [sparsegpt, sparsegpt_textbook])
@pytest.mark.usefixtures("untyped")
def test_bad_arguments(solver):
    W, _, H = layer(4, 8)
    for wrong in (-0.1, 1.5, math.nan, "most"):
        with pytest.raises(ValueError, match="expected"):
            solver(W, H, wrong)
    for percdamp in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="percdamp"):
            solver(W, H, 0.5, percdamp)
    with pytest.raises(ValueError, match="M must divide d_in"):
        solver(W, H, "2:3", blocksize=6)
    with pytest.raises(ValueError, match="M must divide blocksize"):
        solver(W, H, "2:4", blocksize=6)
    with pytest.raises(ValueError, match="blocksize"):
        solver(W, H, 0.5, blocksize=0)
    with pytest.raises(ValueError, match=r"hessian: expected shape \(8, 8\)"):
        solver(W, H[:7, :7], 0.5)
    with pytest.raises(ValueError, match=r"keep: expected a mask of shape \(4, 8\)"):
        solver(W, H, 0.5, keep=torch.ones(8, 4, dtype=torch.bool))
    damaged = W.clone()
    damaged[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        solver(damaged, H, 0.5)


@pytest.mark.parametrize(
    "solver", [sparsegpt, lambda *a, **k: sparsegpt_textbook(*a, **k)[0]], ids=["fast", "textbook"]
)
@pytest.mark.usefixtures("untyped")
class TestBothPaths:
    def test_arguments_of_the_wrong_kind(self, solver):
        W, _, H = layer(4, 8)
        for wrong in (None, W.numpy(), W.tolist()):
            with pytest.raises(TypeError, match="weight: expected a tensor, received"):
                solver(wrong, H, 0.5)
            with pytest.raises(TypeError, match="hessian: expected a tensor, received"):
                solver(W, wrong, 0.5)
        for wrong in (math.nan, 1.5, "128", None):
            with pytest.raises(TypeError, match="blocksize: expected a whole number, received"):
                solver(W, H, 0.5, blocksize=wrong)
        for wrong in (torch.ones(4, 8), torch.ones(4, 8, dtype=torch.int)):
            with pytest.raises(TypeError, match=r"keep: expected a mask of torch\.bool, received torch\."):
                solver(W, H, 0.5, keep=wrong)
        with pytest.raises(TypeError, match="keep: expected a tensor, received list"):
            solver(W, H, 0.5, keep=[[True] * 8] * 4)
        with pytest.raises(TypeError, match="percdamp: expected a number, received str 'x'"):
            solver(W, H, 0.5, percdamp="x")

    def test_bad_hessians(self, solver):
        W, _, H = layer(4, 8)
        for broken in (math.nan, math.inf):
            with pytest.raises(NonFiniteError, match="the Hessian has NaN"):
                solver(W, H * broken, 0.5)
        with pytest.raises(SingularHessianError, match="8 inputs is not positive definite with percdamp 0"):
            solver(W, torch.ones(8, 8, dtype=torch.float64) - 1e-3 * torch.eye(8), 0.5, percdamp=0)
        for wrong in (H.long(), H.cfloat(), H[0]):
            with pytest.raises(ValueError, match="hessian: expected"):
                solver(W, wrong, 0.5)

    def test_parameters_serve_and_record_nothing(self, solver):
        W, _, H = layer(4, 8)
        P = solver(torch.nn.Parameter(W), torch.nn.Parameter(H), 0.5)
        assert torch.equal(P, solver(W, H, 0.5))
        assert not P.requires_grad

    def test_a_result_that_does_not_fit_the_dtype(self, solver):
        H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        keep = torch.tensor([[False, True]])
        for dtype, value in ((torch.float16, 6e4), (torch.float32, 3e38)):
            W = torch.full((1, 2), value, dtype=dtype)
            with pytest.raises(NonFiniteError, match=f"does not fit {dtype}; raise percdamp, or load"):
                solver(W, H, 0.5, keep=keep)
            assert solver(W.double(), H, 0.5, keep=keep).isfinite().all()

    def test_float64_weights_stay_whole_beside_a_float32_hessian(self, solver):
        W, _, H = layer(7, 30)
        assert torch.equal(solver(W, H.float(), 0), W)
        keep = torch.ones(7, 30, dtype=torch.bool)
        keep[:, 20:] = torch.rand(7, 10, generator=torch.Generator().manual_seed(0)) > 0.5
        assert torch.equal(solver(W, H.float(), 0.5, keep=keep)[:, :20], W[:, :20]), "nothing to compensate yet"

    @pytest.mark.parametrize("scale", [1e-25, 1e25])
    @pytest.mark.parametrize("sparsity", ["50%", "2:4"])
    def test_the_scale_of_the_weights_does_not_matter(self, solver, scale, sparsity):
        W, _, H = layer(16, 64)
        expected, scaled = solver(W.float(), H.float(), sparsity), solver((scale * W).float(), H.float(), sparsity)
        assert torch.equal(scaled == 0, expected == 0)


@pytest.mark.usefixtures("untyped")
def test_a_sweep_takes_patterns_in_words_and_only_a_factor_that_fits():
    W, _, H = layer(4, 8)
    factor = factorise(H, 0.01)
    assert torch.equal(sweep(W, factor, "2:4"), sparsegpt(W, H, "2:4"))
    assert torch.equal(sweep(W, factorise(H.float(), 0.01), 0), W), "float64 weights stay whole"
    for size in (1, 7, 9):
        with pytest.raises(ValueError, match=f"factor: expected one of 8 inputs, received one of {size}"):
            sweep(W, factorise(torch.eye(size), 0.01), "50%")
    with pytest.raises(TypeError, match="factor: expected what factorise gives, received Tensor"):
        sweep(W, H, "50%")
    with pytest.raises(NonFiniteError, match="the weight has NaN"):
        sweep(W * math.nan, factor, "50%")


def test_too_few_tokens_without_damping_is_an_error():
    W, _, H = layer(4, 30, tokens=5)
    with pytest.raises(SingularHessianError, match="30 inputs is not positive definite with percdamp 0"):
        sparsegpt(W.float(), H.float() - 1e-3 * torch.eye(30), 0.5, percdamp=0.0)


def test_the_floor_counts_the_factor_once_and_the_product_by_rows():
    assert least_flop(0, 30) == 9000
    assert least_flop(7, 30) - least_flop(0, 30) == 7 * 900
