"""The Triton kernel against the torch path: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from conftest import tiny_llama
from layers import SAME_ERROR, layer

from sparselab import prune
from sparselab.solvers import factorise, relative_error, sweep

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")
from sparselab.solvers.kernels import block_sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("shape", "sparsity", "blocksize"),
    [
        pytest.param((40, 48), "50%", 16, id="blocks and a ragged tile of rows"),
        pytest.param((33, 40), "70%", 128, id="one block, narrower than asked for, not a power of two"),
        pytest.param((20, 36), "60%", 16, id="ragged last block"),
        pytest.param((40, 48), "2:4", 16, id="2:4"),
        pytest.param((9, 24), "1:4", 8, id="1:4"),
        pytest.param((5, 32), "4:8", 32, id="4:8"),
        pytest.param((1, 30), "3:6", 12, id="one row, M not a power of two"),
    ],
)
def test_triton_gives_what_torch_gives(shape, sparsity, blocksize):
    W, X, _ = layer(*shape)
    X[:, 3] = 0  # a dead input
    H = X.T @ X
    factor = factorise(H.to(DEVICE), 0.01)
    torch.testing.assert_close(
        sweep(W.to(DEVICE), factor, sparsity, blocksize, kernel="triton"),
        sweep(W.to(DEVICE), factor, sparsity, blocksize),
    )


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_a_whole_block_in_float32(sparsity):
    W, _, H = layer(40, 128)
    factor = factorise(H.float().to(DEVICE), 0.01)
    pruned = {kernel: sweep(W.float().to(DEVICE), factor, sparsity, kernel=kernel) for kernel in ("torch", "triton")}
    errors = [relative_error(W, weight.cpu().double(), H) for weight in pruned.values()]
    assert errors[0] == pytest.approx(errors[1], rel=SAME_ERROR)
    assert ((pruned["torch"] == 0) == (pruned["triton"] == 0)).float().mean() > 0.995


def test_a_whole_model(tokens, monkeypatch):
    swept = []
    whole = block_sweep.sweep_block
    monkeypatch.setattr(block_sweep, "sweep_block", lambda *blocks: swept.append(1) or whole(*blocks))
    reports = [prune(tiny_llama().to(DEVICE), tokens, kernel=kernel, progress=False) for kernel in ("torch", "triton")]
    assert reports[1].layers.relative_error.tolist() == pytest.approx(
        reports[0].layers.relative_error.tolist(), rel=1e-3
    )
    assert len(swept) == 3 * 4, "three blocks of four distinct inputs"


def test_equal_scores_go_earliest_first():
    W = torch.ones(6, 8, device=DEVICE)
    factor = factorise(torch.eye(8, device=DEVICE), 0.01)
    for pattern in ("2:4", "3:4", "1:2"):
        torch_path, triton_path = (sweep(W, factor, pattern, kernel=kernel) for kernel in ("torch", "triton"))
        assert torch.equal(torch_path, triton_path)


def test_a_given_mask_and_half_precision():
    W, _, H = layer(20, 24)
    keep = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    factor = factorise(H.float().to(DEVICE), 0.01)
    half, keep = W.bfloat16().to(DEVICE), keep.to(DEVICE)
    pruned = sweep(half, factor, "2:4", 8, keep, kernel="triton")
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned != 0, keep)
    other = sweep(half, factor, "2:4", 8, keep)
    errors = [relative_error(half.float(), weight.float(), H.float().to(DEVICE)) for weight in (pruned, other)]
    assert errors[0] == pytest.approx(errors[1], rel=SAME_ERROR)


@pytest.mark.usefixtures("untyped")
def test_where_it_cannot_run_it_says_so():
    W, _, H = layer(4, 8)
    factor = factorise(H.to(DEVICE), 0.01)
    with pytest.raises(ValueError, match="expected blocks of at most 128 columns on a GPU, received blocksize 256"):
        sweep(W.to(DEVICE), factor, 0.5, 256, kernel="triton")
    with pytest.raises(ValueError, match="kernel: expected one of torch, triton, received 'cuda'"):
        sweep(W.to(DEVICE), factor, 0.5, kernel="cuda")
