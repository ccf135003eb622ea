"""What all figures share: colours, markers, a caption under the picture, PNG bytes."""

from collections.abc import Iterator
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe & Ito's palette, distinguishable with any colour vision; markers and line styles say the same again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREY = "#666666"


def styles() -> Iterator[dict[str, Any]]:
    """Endless plot styles; colour, marker and line style change together."""
    for colour, marker, line in zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}


def method_style(method: str) -> dict[str, Any]:
    """The plot style of a method, the same in every figure; an unknown method gets the fourth."""
    known = ("magnitude", "wanda", "sparsegpt")
    index = known.index(method) if method in known else len(known)
    return next(style for number, style in enumerate(styles()) if number == index)


def new_figure(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of its own, never pyplot's, with a grid of axes in reading order; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(visible=True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def captioned(figure: Figure, caption: str) -> Figure:
    """The figure with what it shows (model, tokens, seeds, realised sparsity) written under it."""
    figure.supxlabel(caption, fontsize=8, color="#444444", wrap=True)
    return figure


def png(figure: Figure, dpi: int = 96) -> bytes:
    """The figure as the bytes of a PNG file, drawn in one pass and packed lightly, for widgets that cannot wait."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    buffer = BytesIO()
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    Image.fromarray(pixels).convert("RGB").save(buffer, "png", compress_level=3)
    return buffer.getvalue()
