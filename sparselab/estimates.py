"""About how long runs will take and what they hold, from a few batches through the model's own blocks."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.calibration import collect
from sparselab.evaluation import perplexity
from sparselab.experiment import MEASURES, RunConfig
from sparselab.methods import find
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.inputs import batches

# Passes of the blocks over the calibration windows that a whole run of a method costs, as measured on two CPU cores; of
# others, what one costs that has to know as much; and once, to begin.
_PASSES = {"magnitude": 0.05, "wanda": 1.7, "sparsegpt": 2.4}
_PASSES_BY_NEEDS = {"nothing": 0.05, "feature norms": 1.7, "hessian": 3.0}
_FIRST_PASSES = 2.0


class _Cost(NamedTuple):
    """What something takes in windows' worth, as measured on the bundled model with 8, 32 and 128 windows."""

    once: float
    each: float  # for each calibration window

    def of(self, nsamples: int) -> float:
        return self.once + self.each * nsamples


_COLLECT = _Cost(20, 1.0)  # the statistics of all layers
_SOLVE = _Cost(10, 0)  # a run where these are there already
_GAP = _Cost(60, 0.8)  # of all layers


def seconds_per_window(model: PreTrainedModel, seqlen: int) -> float:
    """What one window takes through the whole model, as measured now.

    Args:
        model: a causal language model.
        seqlen: tokens of the window.
    """
    with evaluating(model):
        tried = next(batches(torch.zeros(64, seqlen, dtype=torch.long), None, Decoder(model).device))
        perplexity(model, tried, progress=False)  # the first call pays for allocations
        started = time.perf_counter()
        for _ in range(3):
            perplexity(model, tried, progress=False)
    return (time.perf_counter() - started) / 3 / len(tried)


def statistics_nbytes(model: PreTrainedModel, windows: Int[Tensor, "n seqlen"]) -> int:
    """Bytes that the Hessians of all layers take together, if all blocks are like the first.

    Args:
        model: a causal language model.
        windows: any, one at least.
    """
    block = collect(model, windows[:1], progress=False, blocks=[0])
    distinct = {id(seen): seen.hessian.nbytes for seen in block.values()}
    return sum(distinct.values()) * len(Decoder(model).blocks)


def windows_passed(
    runs: Sequence[RunConfig], eval_nsamples: int, measure: str = "+".join(MEASURES), shared: bool = False
) -> float:
    """How many windows' worth of time runs take one after another, in a workbench.

    Args:
        runs: what is done, one at least.
        eval_nsamples: evaluation windows after each.
        measure: what is measured after each, see `Workbench`.
        shared: whether they share statistics of one pass.
    """
    measured = eval_nsamples * ("perplexity" in measure)
    total = _COLLECT.of(max(run.nsamples for run in runs)) if shared else 0.0
    for run in runs:
        total += measured + (_SOLVE.of(run.nsamples) if shared else _passes(run.method) * run.nsamples)
        total += _GAP.of(run.nsamples) if "gap" in measure else 0.0
    return total


def windows_before(eval_nsamples: int, nsamples: int) -> float:
    """The same of what comes before the first run: the dense model's perplexity, and statistics of held-out text.

    Args:
        eval_nsamples, nsamples: evaluation and calibration windows.
    """
    return eval_nsamples + _FIRST_PASSES * nsamples


def _passes(method: str) -> float:
    return _PASSES.get(method, _PASSES_BY_NEEDS[find(method).needs])
