"""What all figures share: colours, markers, a caption under the picture, PNG bytes."""

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
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


# Of METHOD+UPDATE: colour and marker say the method, and which half of the marker is filled says the update. No method
# has the same line under two updates, so that lines without markers can be told apart as well.
_METHODS = ("magnitude", "wanda", "sparsegpt", "ria", "admm")
_HALVES = {"none": "top", "sweep": "left", "cg": "bottom", "exact": "right"}
_METHOD_LINES: tuple[Any, ...] = (*LINES, (0, (10, 3)))


def method_style(method: str) -> dict[str, Any]:
    """The plot style of a method, or of one with an update, the same in every figure; an unknown method is black."""
    base, _, update = method.partition("+")
    index = _METHODS.index(base) if base in _METHODS else len(COLOURS) - 1
    turn = 0 if update not in _HALVES else 1 + list(_HALVES).index(update)
    line = _METHOD_LINES[(index + turn) % len(_METHOD_LINES)]
    style = next(islice(styles(), index, None)) | {"linestyle": line}
    if turn:
        style |= {"fillstyle": _HALVES[update], "markerfacecoloralt": "white", "markersize": 7}
    return style


def standing_apart(style: dict[str, Any]) -> dict[str, Any]:
    """The same for a larger marker without a line; an open one, but where its filling has something to say."""
    face = {} if "fillstyle" in style else {"markerfacecolor": "white"}
    return style | face | {"linestyle": "none", "markersize": 8}


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


def scale_y(ax: Axes, measured: list[float]) -> None:
    """A log scale where the values change more than twofold, with ticks close enough to read numbers from.

    Args:
        ax: whose y axis.
        measured: the values on it.
    """
    low, high = (min(measured), max(measured)) if measured else (1.0, 1.0)
    if low <= 0 or high < 2 * low:
        ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        return
    decades = math.log10(high / low)
    ax.set_yscale("log")
    fine, medium, coarse = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 5)
    log_ticks(ax.yaxis, fine if decades < 0.7 else medium if decades < 1.5 else coarse)


def scale_note(ax: Axes) -> str:
    """What the name of a y axis ends in."""
    return " (log scale)" if ax.get_yscale() == "log" else ""


def log_ticks(axis: Axis, multiples: Sequence[float] = (1, 2, 5), numticks: int | None = None) -> None:
    """Ticks of a logarithmic axis, written as plain numbers.

    Args:
        axis: one whose scale is a logarithm already; setting a scale sets other ticks.
        multiples: of powers of ten, where ticks are.
        numticks: about the most there are; None leaves it to matplotlib.
    """
    axis.set_major_locator(LogLocator(subs=multiples, numticks=numticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
