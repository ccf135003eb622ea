"""What pruning takes and what zeros give back: bytes of calibration statistics, seconds of matrix products."""

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from sparselab import solvers
from sparselab.solvers import InputStatistics
from sparselab.storage import csr_parts

Name = TypeVar("Name", bound=Hashable)

# Hidden size, inputs of the last MLP layer, blocks; as their published configurations say.
PUBLISHED = {
    "OPT-125M": (768, 3072, 12),
    "LLaMA-7B": (4096, 11008, 32),
    "LLaMA-2-70B": (8192, 28672, 80),
    "OPT-175B": (12288, 49152, 96),
}


def statistics_bytes(d_in: int, with_hessian: bool) -> int:
    """Bytes of what is kept of one layer's inputs: 4 · d_in² for H = XᵀX, 4 · d_in for the norms ‖X_j‖₂; float32.

    Read off the very object that calibration fills, without its memory.

    Args:
        d_in: inputs of the layer.
        with_hessian: as SparseGPT needs; without, as Wanda does.
    """
    kept = InputStatistics(d_in, with_hessian, device="meta")
    return (kept.hessian if with_hessian else kept.feature_norm).nbytes


def statistics_table(models: Mapping[str, tuple[int, int, int]]) -> pd.DataFrame:
    """Bytes of calibration statistics for whole models: one row a model.

    A block's layers see four inputs: those of q/k/v, of the output projection and of the first MLP layers are as wide
    as the hidden state h, that of the last MLP layer is wider, w: 4 · (3h² + w²) bytes of Hessians in a block.

    Args:
        models: hidden size, inputs of the last MLP layer, and blocks, by name; such as `PUBLISHED`.

    Returns:
        model, hidden, widest, blocks; in bytes: norms_block, hessian_widest, hessians_block, hessians_model.
    """
    rows = []
    for name, (hidden, widest, blocks) in models.items():
        block = {kind: 3 * statistics_bytes(hidden, kind) + statistics_bytes(widest, kind) for kind in (False, True)}
        sizes = {"norms_block": block[False], "hessian_widest": statistics_bytes(widest, True)}
        sizes |= {"hessians_block": block[True], "hessians_model": blocks * block[True]}
        rows.append({"model": name, "hidden": hidden, "widest": widest, "blocks": blocks} | sizes)
    return pd.DataFrame(rows)


def interleaved(
    calls: Mapping[Name, Callable[[], object]], repeats: int = 7, device: torch.device | str = "cpu"
) -> dict[Name, tuple[float, float, float]]:
    """Median, fastest and slowest seconds of each call; all are called in turn, so that none has the quiet minute.

    Args:
        calls: what to time, by name; each is called once before, untimed.
        repeats: rounds.
        device: what to wait for before the clock is read.

    Raises:
        ValueError: fewer than five rounds, whose median would say little.
    """
    if repeats < 5:
        raise ValueError(f"repeats: expected at least 5, received {repeats}")
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = _clock(device)
            call()
            taken[name].append(_clock(device) - started)
    return {name: (statistics.median(each[1:]), min(each[1:]), max(each[1:])) for name, each in taken.items()}


def product_times(
    shape: tuple[int, int],
    tokens: Sequence[int],
    sparsities: Sequence[float],
    generator: torch.Generator,
    repeats: int = 7,
) -> pd.DataFrame:
    """Seconds of X Wᵀ on one CPU thread with the same zeros in a dense W and in CSR, by number of tokens and zeros.

    Args:
        shape: d_out, d_in.
        tokens: rows of X.
        sparsities: fractions of zeros, the smallest weights of a normal draw.
        generator: draws W and X.
        repeats: see `interleaved`.

    Returns:
        tokens, sparsity, form ("dense" or "CSR"), seconds (median), fastest, slowest.
    """
    drawn = torch.randn(shape, generator=generator)
    weights = {sparsity: solvers.magnitude(drawn, sparsity) for sparsity in sparsities}
    sparse = {sparsity: csr_tensor(weight) for sparsity, weight in weights.items()}
    rows = []
    for count in tokens:
        X = torch.randn(count, shape[1], generator=generator)
        columns = X.T.contiguous()
        calls: dict[tuple[float, str], Callable[[], object]] = {}
        for sparsity in sparsities:
            calls[sparsity, "dense"] = partial(linear, X, weights[sparsity])
            calls[sparsity, "CSR"] = partial(torch.mm, sparse[sparsity], columns)
        with one_thread():
            rows += _rows(count, interleaved(calls, repeats))
    return pd.DataFrame(rows)


def break_even(times: pd.DataFrame, tokens: int) -> float:
    """The lowest measured sparsity from which on CSR was faster than dense at every sparsity; NaN if there is none.

    Args:
        times: of `product_times`.
        tokens: which of its numbers of tokens.
    """
    seconds = times[times.tokens == tokens].pivot(index="sparsity", columns="form", values="seconds").sort_index()
    faster = (seconds["CSR"] < seconds["dense"])[::-1].cummin()
    return float(faster.index[faster].min())


def csr_tensor(weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """A weight as torch's sparse CSR tensor, with int32 indices, which its CPU library takes without a copy."""
    parts = csr_parts(weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        return torch.sparse_csr_tensor(
            parts["rows"], parts["columns"], parts["values"], weight.shape, check_invariants=True
        )


def lacks_semi_structured(device: torch.device) -> str:
    """Why 2:4 weights cannot be multiplied as such on a device; "" if they can."""
    if device.type != "cuda":
        return f"2:4 products need an NVIDIA GPU of compute capability 8.0 or newer; this device is {device.type!r}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        major, minor = capability
        return f"2:4 products need compute capability 8.0 or newer; this GPU has {major}.{minor}"
    return ""


def semi_structured_times(
    shape: tuple[int, int],
    tokens: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    repeats: int = 21,
) -> pd.DataFrame:
    """Seconds of X Wᵀ in float16 on a GPU with a 2:4 weight kept dense, and kept as values and places.

    Args:
        shape: d_out, d_in, multiples of 64.
        tokens, generator, repeats: see `product_times`.
        device: a GPU.

    Returns:
        As `product_times`, with the forms "dense" and "2:4".

    Raises:
        ValueError: the device cannot; see `lacks_semi_structured`.
    """
    if reason := lacks_semi_structured(device):
        raise ValueError(f"device: {reason}; leave this measurement out")
    W = solvers.magnitude(torch.randn(shape, generator=generator), "2:4").to(device, torch.float16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        packed = torch.sparse.to_sparse_semi_structured(W)
    rows = []
    for count in tokens:
        X = torch.randn(count, shape[1], generator=generator).to(device, torch.float16)
        calls: dict[tuple[float, str], Callable[[], object]] = {
            (0.5, "dense"): partial(linear, X, W),
            (0.5, "2:4"): partial(linear, X, packed),
        }
        rows += _rows(count, interleaved(calls, repeats, device))
    return pd.DataFrame(rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside: threads that wait for each other on a busy machine measure the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clock(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rows(tokens: int, timed: dict[tuple[float, str], tuple[float, float, float]]) -> list[dict[str, object]]:
    return [
        {"tokens": tokens, "sparsity": sparsity, "form": form, "seconds": median, "fastest": low, "slowest": high}
        for (sparsity, form), (median, low, high) in timed.items()
    ]
