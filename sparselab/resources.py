"""What a piece of work takes: memory at its highest point, and seconds by what they went into."""

import ctypes
import platform
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import psutil
import torch

_SECONDS_BETWEEN_SAMPLES = 0.01


class PeakMemory:
    """The most memory in use between enter and exit, in bytes, above what was in use at enter.

    On a GPU its tensors are counted; on the CPU the resident memory of the process, sampled every 10 ms, so that a
    shorter peak may be missed.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._before = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _return_freed_pages()
            self._before = psutil.Process().memory_info().rss
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss - self._before)
            if self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
                return


def _return_freed_pages() -> None:
    """Let the C library hand back what was freed, or work that takes it again would seem to need nothing.

    Only glibc keeps much, and has the call.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that new work on the device may take: of the machine, and of the control group if that allows less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # version 2 of Linux's, where there is one; "max" where it sets no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Stopwatch:
    """Seconds by stage. A stage inside another interrupts it, so that no second is counted twice.

    On a GPU the stages are told apart by events in its own queue, for which nothing has to wait.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stage = ""
        self._marks: list[tuple[torch.cuda.Event | float, str]] = []  # when a stage began, and which

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside for this stage."""
        outer = self._stage
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def seconds(self) -> dict[str, float]:
        """So far, by stage, in the order in which they first came."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        taken: dict[str, float] = defaultdict(float)
        for (start, stage), (stop, _) in pairwise(self._marks):
            if stage:
                taken[stage] += _between(start, stop)
        return dict(taken)

    def _switch(self, stage: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((event, stage))
        else:
            self._marks.append((time.perf_counter(), stage))
        self._stage = stage


def _between(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return float(start.elapsed_time(stop)) / 1000
    return float(stop) - float(start)  # type: ignore[arg-type]  # both are of one kind
