"""Runs of a bench in the background, which can be watched and cancelled."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sparselab.experiment import RunConfig, Workbench

_SECONDS_BETWEEN_NEWS = 0.2


class _Cancelled(Exception):  # noqa: N818  # not an error: somebody pressed a button
    pass


class Job:
    """Several runs one after another in a thread of its own; what is finished is kept by the bench.

    Only one job may use a bench at a time, and nothing else may touch its model meanwhile.

    Args:
        bench: does the runs and remembers them.
        runs: what to do; those the bench knows already cost nothing.
        tell: called from the thread with the job whenever there is news: often while a run is under way, at least once
            after each run, and at the end.
    """

    def __init__(self, bench: Workbench, runs: Sequence[RunConfig], tell: Callable[["Job"], None]) -> None:
        self.state: Literal["ready", "running", "done", "cancelled", "failed"] = "ready"
        self.finished, self.total = 0, len(runs)
        self.error = ""
        self.current: RunConfig | None = None
        self._bench, self._runs, self._tell = bench, runs, tell
        self._cancel = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._computed, self._started, self._last_news = 0, 0.0, 0.0

    def start(self) -> None:
        """Begin; returns at once."""
        self.state = "running"
        self._started = time.monotonic()
        self._thread.start()

    def cancel(self) -> None:
        """Stop at the next layer or batch of windows; the run under way is lost, the finished ones are not."""
        self._cancel.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most so many seconds."""
        self._thread.join(timeout)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the runs that had to be computed so far; None before the first."""
        if not self._computed:
            return None
        waiting = sum(self._bench.finished(run) is None for run in self._runs)
        return (time.monotonic() - self._started) / self._computed * waiting

    def _work(self) -> None:
        try:
            for run in self._runs:
                self._watch()
                self.current = run
                known = self._bench.finished(run) is not None
                self._bench.run(run, self._watch)
                self.finished += 1
                self._computed += not known
                self._tell(self)
            self.state = "done"
        except _Cancelled:
            self.state = "cancelled"
        except Exception as error:  # whatever it was, whoever waits must see it
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        self.current = None
        self._tell(self)

    def _watch(self, *_: int) -> None:
        if self._cancel.is_set():
            raise _Cancelled
        if time.monotonic() - self._last_news > _SECONDS_BETWEEN_NEWS:
            self._last_news = time.monotonic()
            self._tell(self)
