"""Methods side by side: perplexity against sparsity, layer error by depth."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from sparselab.figures.style import GREY, captioned, log_ticks, method_style, new_figure, standing_apart, styles
from sparselab.solvers import NM, parse_sparsity


def sparsity_perplexity(runs: pd.DataFrame, caption: str) -> Figure:
    """Perplexity against realised sparsity on a log axis, one line a method, with the dense model as a line.

    N:M patterns stand apart from the lines, as larger markers with their names. Bars are one standard error.

    Args:
        runs: the table of a `Comparison`.
        caption: model, tokens and seeds, drawn under the figure.
    """
    figure, (ax,) = new_figure(7.0, 4.8, 1, 1)
    dense = runs[runs.method == "dense"].iloc[0]
    ax.axhline(dense.perplexity, color=GREY, linestyle=(0, (1, 1)), label=f"dense ({dense.perplexity:.2f})")
    for method in runs.method[runs.method != "dense"].unique():
        style = method_style(method)
        points = runs[runs.method == method]
        grouped = points.pattern.map(lambda text: isinstance(parse_sparsity(text), NM))
        line = points[~grouped].sort_values("sparsity")
        ax.errorbar(100 * line.sparsity, line.perplexity, line.stderr, label=method, capsize=3, **style)
        for _, point in points[grouped].iterrows():
            at = (100 * point.sparsity, point.perplexity)
            ax.errorbar(*at, point.stderr, capsize=3, **standing_apart(style))
            ax.annotate(point.pattern, at, (8, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yscale("log")
    log_ticks(ax.yaxis, (1, 1.2, 1.5, 2, 3, 5, 7))
    ax.xaxis.set_major_locator(MultipleLocator(10))
    ax.margins(x=0.08)
    ax.set_xlabel("realised sparsity of the pruned layers (%)")
    ax.set_ylabel("held-out perplexity (log scale)")
    ax.legend(frameon=False, handlelength=3)
    return captioned(figure, caption)


def layer_errors(layers: pd.DataFrame, pattern: str, caption: str) -> Figure:
    """Relative layer error by depth, mean over seeds: one panel a method, one line a projection, one scale for all.

    The scale is logarithmic where there is an error at all; a model that was pruned before has none.

    Args:
        layers: the layers' table of a `Comparison`.
        pattern: which of its patterns to show, as "60%" or "2:4".
        caption: model, tokens and seeds, drawn under the figure.

    Raises:
        ValueError: the table has no such pattern.
    """
    shown = layers[layers.pattern == pattern]
    if shown.empty:
        raise ValueError(f"pattern: expected one of {', '.join(layers.pattern.unique())}, received {pattern!r}")
    methods = list(shown.method.unique())
    scale = "log" if (shown.relative_error > 0).any() else "linear"
    figure, axes = new_figure(4.0 * len(methods), 4.8, 1, len(methods), sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        panel = shown[shown.method == method]
        for name, style in zip(panel.layer.unique(), styles(), strict=False):
            line = panel[panel.layer == name].groupby("block").relative_error.mean()
            ax.plot(line.index, line, label=name.rpartition(".")[2], **style)
        ax.set_title(method)
        ax.set_xlabel("block")
        ax.set_yscale(scale)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(f"relative layer error ({scale} scale)")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    realised = 100 * shown.sparsity.mean()
    return captioned(figure, f"{pattern} (realised {realised:.2f}%); {caption}")
