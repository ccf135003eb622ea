"""How much memory a piece of work took at its highest point."""

import threading
from types import TracebackType

import psutil
import torch

_SECONDS_BETWEEN_SAMPLES = 0.01


class PeakMemory:
    """Peak memory between enter and exit: of the GPU's tensors, or of the whole process where the work is on the CPU.

    The process's resident memory is sampled every 10 ms, so a shorter peak may be missed.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
                return
