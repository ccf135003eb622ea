"""One layer's solve: sparselab beside the published column loop, and beside what the arithmetic alone would take."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparselab import solvers
from sparselab.bench.published import column_loop
from sparselab.bench.timing import interleaved, peak_memory, square_product
from sparselab.progress import Progress, tracked

SHAPES = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096), (11008, 4096))
_RATE_SIZE = 2048


def bench_layers(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    patterns: Sequence[str] = ("50%", "2:4"),
    repeats: int = 5,
    device: torch.device | str = "cpu",
    kernel: solvers.Kernel = "auto",
    progress: Progress = True,
) -> pd.DataFrame:
    """Time SparseGPT's solve (factor and sweep) and the column loop in turns on random layers with correlated inputs.

    Args:
        shapes: pairs (d_out, d_in).
        patterns: see `solvers.sparsegpt`.
        repeats: rounds that count, after one that does not.
        device: where to solve.
        kernel: see `solvers.sweep`.
        progress: a bar over shapes and patterns; see `sparselab.progress`.

    Raises:
        ValueError: a pattern prunes everything, which the column loop cannot; or see `solvers.sweep`.

    Returns:
        One row for each shape and pattern: medians of the seconds of both and the lowest and highest of sparselab's;
        `ratio` of the medians; `share`, the part of sparselab's median that a product of square float32 matrices
        would take for d_in³/3 + d_out·d_in² FLOP at the rate seen in the same rounds; sparselab's peak memory in
        bytes; `error`, sparselab's layer error over the loop's.
    """
    rows, device = [], torch.device(device)
    solvers.block_sweeper(kernel, 128, device)
    if any(solvers.parse_sparsity(pattern).fraction == 1 for pattern in patterns):
        raise ValueError(f"patterns: expected less than everything, which the column loop cannot, received {patterns}")
    with tracked(progress, len(shapes) * len(patterns), "layers", "layer") as advance:
        for shape in shapes:
            weight, hessian = random_layer(*shape, device)
            for pattern in patterns:
                rows.append(_row(weight, hessian, pattern, repeats, kernel))
                advance(1)
    return pd.DataFrame(rows)


def random_layer(
    d_out: int, d_in: int, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_in d_in"]]:
    """A weight and the Hessian of correlated inputs of very different sizes, always the same ones."""
    draw = torch.Generator().manual_seed(d_out * d_in)
    mixing = torch.eye(d_in) + torch.randn(d_in, d_in, generator=draw) / (2 * math.sqrt(d_in))
    inputs = (torch.randn(2 * d_in, d_in, generator=draw) * (0.1 + torch.rand(d_in, generator=draw))).to(device)
    inputs = inputs @ mixing.to(device)
    return torch.randn(d_out, d_in, generator=draw).to(device), inputs.T @ inputs


def mean_ratio(rows: pd.DataFrame) -> float:
    """The geometric mean of the ratios to the column loop."""
    return math.exp(sum(map(math.log, rows.ratio)) / len(rows))


def _row(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    pattern: str,
    repeats: int,
    kernel: solvers.Kernel,
) -> dict[str, object]:
    (d_out, d_in), device = weight.shape, weight.device

    def solve() -> Float[Tensor, "d_out d_in"]:
        return solvers.sweep(weight, solvers.factorise(hessian, 0.01), pattern, kernel=kernel)

    loop_solve = partial(column_loop, weight, hessian, pattern)
    candidates: dict[str, Callable[[], object]] = {
        "loop": loop_solve,
        "sparselab": solve,
        "product": square_product(device, _RATE_SIZE),
    }
    seconds = interleaved(candidates, repeats, device)
    loop, ours, product = (median(seconds[name]) for name in candidates)
    floor = solvers.least_flop(d_out, d_in) / (2 * _RATE_SIZE**3) * product
    errors = [solvers.layer_error(weight, each(), hessian) for each in (solve, loop_solve)]
    return {
        "d_out": d_out,
        "d_in": d_in,
        "sparsity": pattern,
        "loop_seconds": loop,
        "seconds": ours,
        "lowest": min(seconds["sparselab"]),
        "highest": max(seconds["sparselab"]),
        "ratio": loop / ours,
        "share": floor / ours,
        "peak_memory": peak_memory(solve, device),
        "error": errors[0] / errors[1],
    }
