"""Tables to figures. Pure functions: a DataFrame goes in, a matplotlib Figure comes out, nothing is drawn elsewhere."""

from itertools import cycle
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparselab.solvers import NM, parse_sparsity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinguishable with any colour vision; markers and line styles say the same again.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")


def sparsity_perplexity(runs: pd.DataFrame, caption: str) -> "Figure":
    """Perplexity against realised sparsity on a log axis, one line a method, with the dense model as a line.

    N:M patterns stand apart from the lines, as open markers with their names. Bars are one standard error over windows.

    Args:
        runs: the table of a `Comparison`.
        caption: model, tokens and seeds, drawn under the figure.
    """
    from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

    figure, (ax,) = _new_figure(7.0, 4.8, 1, 1)
    dense = runs[runs.method == "dense"].iloc[0]
    ax.axhline(dense.perplexity, color="#666666", linestyle=(0, (1, 1)), label=f"dense ({dense.perplexity:.2f})")
    methods = runs.method[runs.method != "dense"].unique()
    for method, style in zip(methods, _styles(), strict=False):
        points = runs[runs.method == method]
        grouped = points.pattern.map(lambda text: isinstance(parse_sparsity(text), NM))
        line = points[~grouped].sort_values("sparsity")
        ax.errorbar(100 * line.sparsity, line.perplexity, line.stderr, label=method, capsize=3, **style)
        alone = style | {"linestyle": "none", "markerfacecolor": "white", "markersize": 8}
        for _, point in points[grouped].iterrows():
            at = (100 * point.sparsity, point.perplexity)
            ax.errorbar(*at, point.stderr, capsize=3, **alone)
            ax.annotate(point.pattern, at, (8, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MultipleLocator(10))
    ax.margins(x=0.08)
    ax.set_xlabel("realised sparsity of the pruned layers (%)")
    ax.set_ylabel("held-out perplexity (log scale)")
    ax.legend(frameon=False)
    return _captioned(figure, caption)


def layer_errors(layers: pd.DataFrame, pattern: str, caption: str) -> "Figure":
    """Relative layer error by depth: one panel a method, one line a projection, one scale for all.

    Args:
        layers: the layers' table of a `Comparison`.
        pattern: which of its patterns to show, as "60%" or "2:4".
        caption: model, tokens and seeds, drawn under the figure.

    Raises:
        ValueError: the table has no such pattern.
    """
    from matplotlib.ticker import MaxNLocator

    shown = layers[layers.pattern == pattern]
    if shown.empty:
        raise ValueError(f"pattern: expected one of {', '.join(layers.pattern.unique())}, received {pattern!r}")
    methods = list(shown.method.unique())
    figure, axes = _new_figure(4.0 * len(methods), 4.8, 1, len(methods), sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        panel = shown[shown.method == method]
        for name, style in zip(panel.layer.unique(), _styles(), strict=False):
            line = panel[panel.layer == name]
            ax.plot(line.block, line.relative_error, label=name.rpartition(".")[2], **style)
        ax.set_title(method)
        ax.set_xlabel("block")
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("relative layer error (log scale)")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    realised = 100 * shown.sparsity.mean()
    return _captioned(figure, f"{pattern} (realised {realised:.2f}%); {caption}")


def _styles() -> Any:
    """Endless plot styles; colour, marker and line style change together."""
    return (
        {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
        for colour, marker, line in zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_LINES), strict=False)
    )


def _new_figure(width: float, height: float, rows: int, columns: int, **options: Any) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(visible=True, color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _captioned(figure: "Figure", caption: str) -> "Figure":
    figure.supxlabel(caption, fontsize=8, color="#444444", wrap=True)
    return figure
