import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from sparselab import solvers
from sparselab.solvers import damped, factorise, layer_error, row_grids, sparsegpt, sparsegpt_textbook, sweep


def column_loop(W, H, sparsity, wbits, percdamp=0.01, blocksize=128):
    """Prune and round column after column with the inverse of what remains, as the published code does, in float64."""
    W, dense = W.clone(), W
    U = torch.linalg.cholesky(torch.linalg.inv(damped(H, percdamp)), upper=True)
    top = 2**wbits - 1
    low, high = dense.min(dim=1).values.clamp(max=0), dense.max(dim=1).values.clamp(min=0)
    step = (high - low) / top
    zero = torch.round(-low / step)
    for q in range(W.shape[1]):
        if q % blocksize == 0:
            block = W[:, q : q + blocksize] ** 2 / U.diagonal()[q : q + blocksize] ** 2
            count = round(solvers.parse_sparsity(sparsity).fraction * block.numel())
            gone = torch.zeros(block.numel(), dtype=torch.bool)
            gone[block.flatten().argsort()[:count]] = True
            gone = gone.view(block.shape)
        w = W[:, q].clone()
        rounded = step * (torch.clamp(torch.round(w / step) + zero, 0, top) - zero)
        rounded[gone[:, q % blocksize]] = 0
        W[:, q:] -= torch.outer((w - rounded) / U[q, q], U[q, q:])
        W[:, q] = rounded
    return W


@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", ["0%", "50%", "80%"])
@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_equals_the_column_loop(wbits, sparsity, kernel):
    W, _, H = layer(70, 24)  # more rows than a tile of the compiled kernel
    expected = column_loop(W, H, sparsity, wbits, blocksize=8)
    pruned = sweep(W, factorise(H, 0.01), sparsity, 8, kernel=kernel, wbits=wbits)
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparsegpt(W, H, sparsity, blocksize=8, wbits=wbits), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_the_textbook_rounds_alike_and_accounts_for_the_whole_error(sparsity):
    W, _, H = layer(12, 16)
    pruned, errors = sparsegpt_textbook(W, H, sparsity, blocksize=8, wbits=3)
    for kernel in ("numba", "torch"):
        again = sweep(W, factorise(H, 0.01), sparsity, 8, kernel=kernel, wbits=3)
        torch.testing.assert_close(again, pruned, rtol=1e-9, atol=1e-12)
    assert float(errors.square().sum()) == pytest.approx(layer_error(W, pruned, damped(H, 0.01)))


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8), st.integers(0, 99))
def test_every_weight_is_on_its_rows_grid_and_zeros_stay(d_out, d_in, wbits, seed):
    W, _, H = layer(d_out, d_in, seed)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    pruned = sparsegpt(W, H, 0.5, keep=keep, wbits=wbits)
    assert (pruned[~keep] == 0).all()
    grid = row_grids(W, wbits)
    values = grid.step[:, None] * (torch.arange(2.0**wbits) - grid.zero[:, None])
    distance = (pruned[:, :, None] - values[:, None, :]).abs().amin(dim=-1)
    assert (distance <= 1e-12 * grid.step[:, None]).all()
    assert (values == 0).any(dim=1).all()


def test_compensating_for_rounding_beats_rounding_afterwards():
    W, _, H = layer(48, 64)
    afterwards = row_grids(W, 3).round(sparsegpt(W, H, "50%").T).T
    assert layer_error(W, sparsegpt(W, H, "50%", wbits=3), H) < layer_error(W, afterwards, H)


def test_a_grid_reaches_from_the_lowest_weight_to_the_highest_and_always_has_zero():
    W = torch.tensor([[-1.0, 0.5, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    grid = row_grids(W, 2)
    torch.testing.assert_close(grid.step, torch.tensor([1.0, 1.0, 1.0]))
    torch.testing.assert_close(grid.zero, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(grid.round(W.T).T, torch.tensor([[-1.0, 0.0, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    W, _, H = layer(3, 8)
    with pytest.raises(ValueError, match="wbits: expected at least 1, received 0"):
        sparsegpt(W, H, "50%", wbits=0)
    with pytest.raises(ValueError, match="wbits: expected at most 16, received 17"):
        sparsegpt(W, H, "50%", wbits=17)
    with pytest.raises(TypeError, match="wbits: expected a whole number, received float"):
        sparsegpt(W, H, "50%", wbits=4.0)
    with pytest.raises(ValueError, match="kernel 'triton'"):
        sweep(W, factorise(H, 0.01), "50%", kernel="triton", wbits=4)
