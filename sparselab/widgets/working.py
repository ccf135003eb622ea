"""A panel with a Run and a Cancel button for what takes a while."""

from collections.abc import Callable, Sequence

from ipywidgets import Button, FloatProgress, Widget

from sparselab.errors import SparselabError
from sparselab.progress import in_time
from sparselab.widgets.job import Job, Work
from sparselab.widgets.panel import Panel, View, row


class WorkingPanel(Panel):
    """Controls, Run and Cancel with a bar, and what has been found so far, drawn anew after each unit of work.

    Args:
        controls, draw: see `Panel`.
        work: makes what Run does out of the controls; raises ValueError if they ask for nothing that can be done.
        unit: what is counted, in the plural.
    """

    def __init__(
        self, controls: Sequence[Widget], draw: Callable[[], View], work: Callable[[], Work], unit: str
    ) -> None:
        self._make_work, self._unit, self._drawn = work, unit, 0
        self.job: Job | None = None
        self.run_button = Button(description="Run", icon="play", button_style="primary")
        self.cancel_button = Button(description="Cancel", icon="stop", disabled=True)
        self.progress = FloatProgress(value=0, min=0, max=1, description="")
        super().__init__([*controls, row(self.run_button, self.cancel_button, self.progress)], draw)
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())

    def start(self) -> None:
        """Do what the controls ask for, in the background."""
        self.do(self._make_work)

    def do(self, make: Callable[[], Work]) -> None:
        """Do something else in the same way, unless something is under way."""
        if self.job is not None and self.job.state == "running":
            return
        try:
            work = make()
        except (SparselabError, ValueError) as error:
            self.say(str(error), failed=True)
            return
        self.job, self._drawn, self.progress.value = Job(work, self._news), 0, 0
        self.run_button.disabled, self.cancel_button.disabled = True, False
        self.say("running")
        self.job.start()

    def cancel(self) -> None:
        """Stop as soon as may be; what is finished stays."""
        if self.job is not None:
            self.job.cancel()

    def _news(self, job: Job) -> None:
        self.progress.value = job.finished / job.total if job.total else float(job.state == "done")
        if job.finished != self._drawn:
            self._drawn = job.finished
            self.refresh()
        if job.state != "running":
            self.run_button.disabled, self.cancel_button.disabled = False, True
        self.say(self._words(job), failed=job.state == "failed")

    def _words(self, job: Job) -> str:
        so_far = f"{job.finished} of {job.total} {self._unit}"
        if job.state == "failed":
            return f"failed after {so_far}: {job.error}"
        if job.state == "cancelled":
            return f"cancelled: {so_far}, all kept"
        if job.state == "done":
            return f"done: {job.result or so_far}"
        if not job.total:
            return self._under_way()
        left = "" if job.seconds_left is None else f", about {in_time(job.seconds_left)} left"
        return f"{self._under_way()}: {so_far}{left}"

    def _under_way(self) -> str:
        """What is being done now."""
        return "running"
