"""What all widgets share: controls above a picture, its numbers beside it, one line that says how things stand."""

import base64
import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
from ipywidgets import HTML, HBox, Image, Layout, VBox, Widget
from matplotlib.figure import Figure

from sparselab.errors import SparselabError
from sparselab.figures import png


class View(NamedTuple):
    """What a widget shows of a state.

    Args:
        figure: the picture, caption included.
        numbers: the numbers behind it, as a table of text or rounded numbers.
        summary: one line of words that says the same to those who cannot see the picture.
    """

    figure: Figure
    numbers: pd.DataFrame
    summary: str


class Panel(VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Controls, a picture with its numbers, and a status line.

    Saved in a notebook it also carries its picture, so that pages without a kernel show that.

    Args:
        controls: rows of widgets above the picture.
        draw: makes the view of the controls' present values; called whenever `refresh` is.
    """

    def __init__(self, controls: Sequence[Widget], draw: Callable[[], View]) -> None:
        self._draw = draw
        self.picture = Image(format="png", layout=Layout(max_width="100%", align_self="flex-start"))
        self.numbers = HTML()
        self.status = HTML()
        super().__init__([*controls, self.status, self.picture, self.numbers])

    def refresh(self, *_: Any) -> None:
        """Draw anew from the controls; an error becomes the status line, and the last picture stays."""
        try:
            view = self._draw()
        except (SparselabError, ValueError) as error:
            self.say(str(error), failed=True)
            return
        self.picture.value = png(view.figure)
        self.numbers.value = view.numbers.to_html(border=0, index=False, justify="left", classes="sparselab-numbers")
        self.say(view.summary)

    def say(self, text: str, failed: bool = False) -> None:
        """Put one line under the controls; a failure is marked in words and colour."""
        line = html.escape(" ".join(text.split()))
        colour, before = ("#B00020", "⚠ ") if failed else ("inherit", "")
        self.status.value = f'<span role="status" style="color:{colour}">{before}{line}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None and self.picture.value:
            bundle["image/png"] = base64.b64encode(self.picture.value).decode()
        return bundle


def row(*controls: Widget) -> HBox:
    """Controls side by side, wrapping on narrow screens."""
    return HBox(controls, layout=Layout(flex_flow="row wrap"))
