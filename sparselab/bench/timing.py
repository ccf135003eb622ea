"""Timing that can be believed: candidates take turns, so that a slow minute of the machine hits all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

import sparselab
from sparselab.resources import PeakMemory, processor


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `repeats` rounds, in which they take turns.

    Args:
        candidates: what to run, by name.
        repeats: rounds that count, after one that does not.
        device: waited for before and after each run.
        prepare: called before each run; not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            prepare()
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one run takes at its highest point; see `PeakMemory`."""
    with PeakMemory(device) as memory:
        run()
    return memory.bytes


def square_product(device: torch.device, size: int) -> Callable[[], object]:
    """A float32 product of two square matrices, 2·size³ FLOP: what the machine can do at its best.

    Returns:
        A candidate for `interleaved`.
    """
    a, b = torch.randn(2, size, size, device=device)
    return lambda: a @ b


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sparselab": sparselab.__version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
