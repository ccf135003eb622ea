"""Work in the background, which can be watched and cancelled."""

import threading
import time
from collections.abc import Callable
from typing import Literal

_SECONDS_BETWEEN_NEWS = 0.2


class _Cancelled(Exception):  # noqa: N818  # not an error: somebody pressed a button
    pass


# Called with a function that it has to call often, with (units done, units in all), the first time before it does any,
# and (0, 0) as long as it does not know; what that raises has to end the work. Gives what is to be said in the end, if
# that is more than how much was done.
Work = Callable[[Callable[[int, int], None]], str | None]


class Job:
    """One piece of work in a thread of its own.

    Args:
        work: what to do.
        tell: called from the thread with the job whenever there is news: often while it is under way, at least once
            after each unit, and at the end.
    """

    def __init__(self, work: Work, tell: Callable[["Job"], None]) -> None:
        self.state: Literal["ready", "running", "done", "cancelled", "failed"] = "ready"
        self.finished, self.total = 0, 0
        self.error = ""
        self.result: str | None = None
        self._before = 0  # units that were done when it began
        self._work, self._tell = work, tell
        self._cancel = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started, self._last_news = 0.0, 0.0

    def start(self) -> None:
        """Begin; returns at once."""
        self.state = "running"
        self._thread.start()

    def cancel(self) -> None:
        """Stop as soon as the work says how far it is."""
        self._cancel.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most so many seconds."""
        self._thread.join(timeout)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the units so far; None before the first."""
        if not (done := self.finished - self._before):
            return None
        return (time.monotonic() - self._started) / done * (self.total - self.finished)

    def _run(self) -> None:
        try:
            self.result = self._work(self._watch)
            self.state = "done"
        except _Cancelled:
            self.state = "cancelled"
        except Exception as error:  # whatever it was, whoever waits must see it
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        self._tell(self)

    def _watch(self, done: int, total: int) -> None:
        if not self.total:  # now it is known what is to be done
            self._before, self._started = done, time.monotonic()
        further = done > self.finished
        self.finished, self.total = done, total
        if self._cancel.is_set():
            raise _Cancelled
        if further or time.monotonic() - self._last_news > _SECONDS_BETWEEN_NEWS:
            self._last_news = time.monotonic()
            self._tell(self)
