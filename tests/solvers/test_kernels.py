"""Every kernel against the torch one: Triton's on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from layers import SAME_ERROR, layer

from sparselab import prune
from sparselab.solvers import block_sweeper, factorise, relative_error, sweep
from sparselab.solvers.kernels import _triton_runs, numba_sweep

DEVICES = {"numba": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(params=DEVICES)
def kernel(request):
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed; it comes with torch for CUDA")
    return request.param


@pytest.fixture
def device(kernel):
    return DEVICES[kernel]


@pytest.mark.parametrize(
    ("shape", "sparsity", "blocksize"),
    [
        pytest.param((40, 48), "50%", 16, id="blocks and a ragged tile of rows"),
        pytest.param((200, 40), "70%", 128, id="more than a tile, one block narrower than asked for"),
        pytest.param((20, 37), "60%", 16, id="ragged last block"),
        pytest.param((40, 48), "2:4", 16, id="2:4"),
        pytest.param((9, 24), "1:4", 8, id="1:4"),
        pytest.param((9, 24), "1:2", 6, id="1:2, half of what is done together"),
        pytest.param((9, 24), "0:1", 6, id="0:1, everything"),
        pytest.param((5, 32), "4:8", 32, id="4:8"),
        pytest.param((1, 30), "3:6", 12, id="one row, M not a power of two"),
        pytest.param((40, 128), "1:4", 128, id="a whole block"),
    ],
)
def test_it_gives_what_torch_gives(shape, sparsity, blocksize, kernel, device):
    W, X, _ = layer(*shape)
    X[:, 3] = 0  # a dead input
    factor = factorise((X.T @ X).to(device), 0.01)
    pruned = [sweep(W.to(device), factor, sparsity, blocksize, kernel=each) for each in (kernel, "torch")]
    torch.testing.assert_close(*pruned)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_a_whole_block_in_float32(sparsity, kernel, device):
    W, _, H = layer(40, 128)
    factor = factorise(H.float().to(device), 0.01)
    pruned = [sweep(W.float().to(device), factor, sparsity, kernel=each) for each in (kernel, "torch")]
    errors = [relative_error(W, weight.cpu().double(), H) for weight in pruned]
    assert errors[0] == pytest.approx(errors[1], rel=SAME_ERROR)
    assert ((pruned[0] == 0) == (pruned[1] == 0)).float().mean() > 0.995


def test_a_whole_model(tokens, kernel, device, monkeypatch):
    swept = []
    module = importlib.import_module(f"sparselab.solvers.kernels.{kernel}_sweep")
    whole = module.sweep_block
    monkeypatch.setattr(module, "sweep_block", lambda *blocks: swept.append(1) or whole(*blocks))
    reports = [prune(tiny_llama().to(device), tokens, kernel=each, progress=False) for each in (kernel, "torch")]
    errors = [report.layers.relative_error.tolist() for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert len(swept) == 3 * 4, "three blocks of four distinct inputs"


def test_equal_scores_go_earliest_first(kernel, device):
    W = torch.ones(6, 8, device=device)
    factor = factorise(torch.eye(8, device=device), 0.01)
    for pattern in ("2:4", "3:4", "1:2"):
        assert torch.equal(*(sweep(W, factor, pattern, kernel=each) for each in (kernel, "torch")))


def test_a_given_mask_and_half_precision(kernel, device):
    W, _, H = layer(20, 24)
    keep = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    factor = factorise(H.float().to(device), 0.01)
    half, keep = W.bfloat16().to(device), keep.to(device)
    pruned = [sweep(half, factor, "2:4", 8, keep, each) for each in (kernel, "torch")]
    assert pruned[0].dtype == torch.bfloat16
    assert torch.equal(pruned[0] != 0, keep)
    errors = [relative_error(half.float(), weight.float(), H.float().to(device)) for weight in pruned]
    assert errors[0] == pytest.approx(errors[1], rel=SAME_ERROR)


def test_numba_gives_the_same_bits_with_any_number_of_threads():
    W, _, H = layer(300, 64)
    factor, threads = factorise(H.float(), 0.01), torch.get_num_threads()
    try:
        pruned = []
        for number in (1, 2):
            torch.set_num_threads(number)
            pruned.append(sweep(W.float(), factor, "2:4", kernel="numba"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*pruned)


def test_numba_without_a_folder_to_keep_what_it_compiles(monkeypatch):
    compiled = numba.njit

    def nowhere(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    numbers = np.zeros(3)
    numba_sweep._compiled()(_add_one)(numbers)
    assert numbers.tolist() == [1, 1, 1]


def _add_one(numbers):
    numbers += 1


def test_numba_leaves_torch_its_number_of_threads():
    """In a process of its own, as numba starts its threads once."""
    code = (
        "import torch; from sparselab.solvers import sparsegpt; torch.set_num_threads(1);"
        "sparsegpt(torch.randn(200, 8), torch.eye(8), 0.5); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_what_auto_is():
    assert block_sweeper("auto", 128, torch.device("cpu")) is block_sweeper("numba", 128, torch.device("cpu"))
    assert block_sweeper("auto", 256, torch.device("cuda")) is block_sweeper("torch", 256, torch.device("cuda"))


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")
    device = torch.device("cuda")
    assert block_sweeper("auto", 128, device) is block_sweeper("triton", 128, device)


def test_auto_does_without_triton_and_says_why(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("sparselab.solvers.kernels._triton", broken)
    _triton_runs.cache_clear()
    device = torch.device("cuda")
    with pytest.warns(UserWarning, match="cannot run on cuda.* RuntimeError: Failed to find C compiler"):
        assert block_sweeper("auto", 128, device) is block_sweeper("torch", 128, device)
    _triton_runs.cache_clear()


def test_where_one_cannot_run_it_says_so():
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")
    with pytest.raises(ValueError, match="expected blocks of at most 128 columns on a GPU, received blocksize 256"):
        block_sweeper("triton", 256, torch.device("cpu"))
    with pytest.raises(ValueError, match="'numba': expected weights on the CPU, received some on cuda"):
        block_sweeper("numba", 128, torch.device("cuda"))
    with pytest.raises(ValueError, match="kernel: expected one of auto, numba, torch, triton, received 'cuda'"):
        block_sweeper("cuda", 128, torch.device("cuda"))
