"""A whole model: sparselab beside the two forward passes that nothing can avoid, and beside the published flow."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.bench.published import published_flow
from sparselab.bench.timing import interleaved, peak_memory
from sparselab.calibration import enter
from sparselab.models.blocks import Decoder, evaluating
from sparselab.progress import Progress, tracked
from sparselab.pruning import prune
from sparselab.solvers import Kernel

METHODS = ("sparsegpt", "wanda", "magnitude")


def bench_model(
    model: PreTrainedModel,
    windows: Int[Tensor, "n seqlen"],
    methods: Sequence[str] = METHODS,
    sparsity: str = "50%",
    repeats: int = 5,
    published: bool = True,
    kernel: Kernel = "auto",
    progress: Progress = True,
) -> pd.DataFrame:
    """Time whole runs in turns, calibration included, each on a copy of the model.

    Args:
        model: left as it is.
        windows: calibration tokens.
        methods: see `prune`; SparseGPT measures its layer errors, the others do not.
        sparsity: see `prune`.
        repeats: rounds that count, after one that does not.
        published: run the published flow too; it takes long.
        kernel: see `solvers.sweep`.
        progress: a bar over runs; see `sparselab.progress`.

    Returns:
        One row a run: median, lowest and highest seconds, and the median's ratio to that of the two forward passes.
    """
    device = Decoder(model).device
    pruned = copy.deepcopy(model)
    runs: dict[str, Callable[[], object]] = {"two forwards": partial(two_forwards, pruned, windows)}
    runs |= {method: partial(_prune, pruned, windows, method, sparsity, kernel) for method in methods}
    if published:
        runs["published flow"] = partial(published_flow, pruned, windows, sparsity)
    with tracked(progress, len(runs) * (repeats + 1), "whole model", "run") as advance:

        def dense_again() -> None:
            pruned.load_state_dict(model.state_dict())
            advance(1)

        seconds = interleaved(runs, repeats, device, prepare=dense_again)
    floor = median(seconds["two forwards"])
    rows = []
    for name, run in runs.items():
        pruned.load_state_dict(model.state_dict())
        taken = seconds[name]
        rows.append(
            {
                "run": name,
                "seconds": median(taken),
                "lowest": min(taken),
                "highest": max(taken),
                "over_forwards": median(taken) / floor,
                "peak_memory": peak_memory(run, device),
            }
        )
    return pd.DataFrame(rows)


def two_forwards(model: PreTrainedModel, windows: Int[Tensor, "n seqlen"]) -> None:
    """Every block run twice on every window, in the batches of `prune`, and nothing else."""
    decoder = Decoder(model)
    with evaluating(model):
        streams = enter(decoder, windows, None)
        for index in range(len(decoder.blocks)):
            for _ in range(2):
                sent_on = [decoder.run_block(index, stream.hidden, stream.calls[index]) for stream in streams]
            for stream, hidden in zip(streams, sent_on, strict=True):
                stream.hidden = hidden


def _prune(
    model: PreTrainedModel, windows: Int[Tensor, "n seqlen"], method: str, sparsity: str, kernel: Kernel
) -> None:
    prune(model, windows, method, sparsity, measure_error=method == "sparsegpt", kernel=kernel, progress=False)
