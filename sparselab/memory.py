"""How much memory a piece of work took at its highest point."""

import ctypes
import sys
import threading
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
