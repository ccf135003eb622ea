"""About how long runs will take, from the speed of a few batches of the model's own blocks."""

import time
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from sparselab.evaluation import perplexity
from sparselab.experiment import RunConfig
from sparselab.methods import find
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.inputs import batches

# Passes of the blocks over the calibration windows that a whole run of a method costs, as measured on two CPU cores; of
# others, what one costs that has to know as much. Then what it costs to measure the layers, and once, to begin.
_PASSES = {"magnitude": 0.05, "wanda": 1.7, "sparsegpt": 2.4}
_PASSES_BY_NEEDS = {"nothing": 0.05, "feature norms": 1.7, "hessian": 3.0}
_QUALITY_PASSES = 2.0
_FIRST_PASSES = 2.0


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


def windows_passed(runs: Iterable[RunConfig], eval_nsamples: int) -> float:
    """How many windows' worth of time runs take one after another, in a workbench that measures layers too.

    Args:
        runs: what is done.
        eval_nsamples: evaluation windows after each.
    """
    each = [eval_nsamples + (_passes(run.method) + _QUALITY_PASSES) * run.nsamples for run in runs]
    return sum(each)


def windows_before(eval_nsamples: int, nsamples: int) -> float:
    """The same of what comes before the first run: the dense model's perplexity, and statistics of held-out text.

    Args:
        eval_nsamples, nsamples: evaluation and calibration windows.
    """
    return eval_nsamples + _FIRST_PASSES * nsamples


def _passes(method: str) -> float:
    return _PASSES.get(method, _PASSES_BY_NEEDS[find(method).needs])
