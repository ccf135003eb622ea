"""Costs as measured: methods side by side, bytes of statistics by width, seconds and bytes by sparsity."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparselab.cost import break_even, statistics_bytes
from sparselab.figures.style import (
    COLOURS,
    GREY,
    captioned,
    log_ticks,
    method_style,
    new_figure,
    scale_note,
    scale_y,
    styles,
)

HATCHES = {"magnitude": "", "wanda": "//", "sparsegpt": "xx", "ria": "\\\\", "admm": "++"}
FORM_STYLES = dict(zip(("dense", "bitmask", "CSR", "2:4"), styles(), strict=False))


def method_costs(runs: pd.DataFrame, caption: str) -> Figure:
    """Perplexity, layer error, seconds and memory of each method: one panel a quantity, one bar a method, from zero.

    Args:
        runs: rows of a `Workbench` at one sparsity, a dense row first (see `comparison.dense_row`).
        caption: model, tokens, seeds and realised sparsity, drawn under the figure.
    """
    figure, axes = new_figure(12.5, 3.4, 1, 4)
    dense, pruned = runs[runs.method == "dense"].iloc[0], runs[runs.method != "dense"]
    panels = {
        "perplexity": ("held-out perplexity", "{:.2f}"),
        "relative_error": ("relative layer error", "{:.3f}"),
        "seconds": ("seconds to prune", "{:.1f}"),
        "peak_memory_mb": ("peak memory (MB)", "{:.0f}"),
    }
    for ax, (column, (title, form)) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(pruned.itertuples()):
            look = {
                "color": method_style(str(row.method))["color"],
                "hatch": HATCHES.get(str(row.method).partition("+")[0], ".."),
            }
            error = row.stderr if column == "perplexity" else None
            height = getattr(row, column)
            ax.bar(place, height, width=0.65, yerr=error, capsize=4, edgecolor="white", **look)
            ax.annotate(
                form.format(height), (place, height + (error or 0)), (0, 3), textcoords="offset points", ha="center"
            )
        ax.set_xticks(range(len(pruned)), list(pruned.method))
        ax.set_title(title, fontsize=11)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.12)
    axes[0].axhline(dense.perplexity, color="black", linestyle=(0, (1, 1)))
    axes[0].set_title(f"held-out perplexity (dotted: dense {dense.perplexity:.2f})", fontsize=10)
    return captioned(figure, caption)


def trade_offs(runs: pd.DataFrame, caption: str) -> Figure:
    """Perplexity against seconds and against memory: a marker a method, a line through those at one pattern.

    Where one marker lies below and to the left of another on its line, that method is better in both.

    Args:
        runs: a row a run, none of them failed, as `results.read_runs` gives them; drawn are means over seeds.
        caption: model, tokens and seeds, drawn under the figure.
    """
    figure, axes = new_figure(11.0, 4.8, 1, 2, sharey=True)
    columns = {"seconds": "seconds to calibrate and prune", "peak_memory_mb": "peak memory besides the model (MB)"}
    means = runs.groupby(["method", "pattern"], sort=False)[["perplexity", *columns]].mean().reset_index()
    for ax, (column, label) in zip(axes, columns.items(), strict=True):
        named: list[float] = []
        for pattern, some in means.groupby("pattern", sort=False):
            ordered = some.sort_values(column)
            ax.plot(ordered[column], ordered.perplexity, color=GREY, linewidth=0.8, zorder=1)
            end, shift, side = ordered.iloc[-1], 6, "left"
            if any(abs(math.log(end.perplexity / other)) < 0.04 for other in named):  # names would overlap
                end, shift, side = ordered.iloc[0], -6, "right"
            else:
                named.append(end.perplexity)
            at = (end[column], end.perplexity)
            ax.annotate(str(pattern), at, (shift, 0), textcoords="offset points", ha=side, fontsize=9)
        for method, some in means.groupby("method", sort=False):
            ax.plot(
                some[column], some.perplexity, **method_style(str(method)) | {"linestyle": "none"}, label=str(method)
            )
        ax.set_xscale("log")
        log_ticks(ax.xaxis)
        if means[column].max() < 2 * means[column].min():  # no such tick might be between them
            ax.set_xlim(means[column].min() / 2, 2 * means[column].max())
        ax.set_xlabel(f"{label} (log scale)")
    scale_y(axes[0], means.perplexity.tolist())
    axes[0].set_ylabel("held-out perplexity" + scale_note(axes[0]))
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return captioned(figure, caption)


def statistics_memory(table: pd.DataFrame, claims: dict[str, float], caption: str) -> Figure:
    """Bytes of one layer's statistics against its width, on log axes, with the widths of models marked.

    Args:
        table: of `cost.statistics_table`.
        claims: bytes that somebody states, by name; drawn as lines across.
        caption: what the figure shows, drawn under it.
    """
    figure, (ax,) = new_figure(10.0, 5.2, 1, 1)
    widths = np.geomspace(table.hidden.min() / 1.5, table.widest.max() * 1.5, 30).round().astype(int)
    for label, full, colour, line in (
        ("Hessian $X^\\top X$: $4d^2$ bytes (SparseGPT)", True, COLOURS[2], "-."),
        ("norms $\\Vert X_j\\Vert_2$: $4d$ bytes (Wanda)", False, COLOURS[1], "--"),
    ):
        ax.plot(widths, [statistics_bytes(int(d), full) for d in widths], color=colour, linestyle=line, label=label)
    for (_, row), style in zip(table.iterrows(), styles(), strict=False):
        look = {"color": "black", "marker": style["marker"], "linestyle": "none", "markersize": 7}
        for full, label in ((True, f"{row.model} (d = {row.hidden}, {row.widest})"), (False, "_")):
            both = [statistics_bytes(int(d), full) for d in (row.hidden, row.widest)]
            ax.plot([row.hidden, row.widest], both, label=label, **look)
    for name, size in claims.items():
        ax.axhline(size, color=COLOURS[3], linestyle=(0, (1, 1)))
        ax.annotate(
            name, (0.01, size), (0, 3), ("axes fraction", "data"), "offset points", color=COLOURS[3], fontsize=9
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("inputs of the layer, $d$ (log scale)")
    ax.set_ylabel("bytes (log scale)")
    powers = range(3, 13, 3)
    ax.set_yticks([10.0**power for power in powers], ["1 kB", "1 MB", "1 GB", "1 TB"])
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return captioned(figure, caption)


def product_seconds(times: pd.DataFrame, caption: str) -> Figure:
    """Milliseconds of a product against the zeros in its weight, dense and CSR: one panel a number of tokens.

    Points are medians, bars reach from the fastest to the slowest round, a vertical line marks where CSR starts to win.

    Args:
        times: of `cost.product_times`.
        caption: shapes and threads, drawn under the figure.
    """
    counts = times.tokens.unique().tolist()
    figure, axes = new_figure(5.2 * len(counts), 4.2, 1, len(counts))
    for ax, count in zip(axes, counts, strict=True):
        shown = times[times.tokens == count]
        for form in shown.form.unique():
            line = shown[shown.form == form].sort_values("sparsity")
            spread = 1e3 * np.stack([line.seconds - line.fastest, line.slowest - line.seconds])
            at = (100 * line.sparsity, 1e3 * line.seconds)
            ax.errorbar(*at, spread, label=form, capsize=3, **FORM_STYLES[form])
        where = break_even(times, count)
        found = "CSR never faster" if np.isnan(where) else f"CSR faster from {where:.0%} zeros"
        if not np.isnan(where):
            ax.axvline(100 * where, color=GREY, linestyle=(0, (1, 1)))
        ax.set_title(f"{count} token{'s' if count > 1 else ''}: {found}", fontsize=11)
        _log_milliseconds(ax)
        ax.set_xlabel("zeros in the weight (%)")
    axes[0].set_ylabel("milliseconds a product (log scale)")
    axes[0].legend(frameon=False)
    return captioned(figure, caption)


def stored_bytes(table: pd.DataFrame, caption: str) -> Figure:
    """Size of a stored weight, relative to dense, against its zeros: one panel a width of values, one line a form.

    The form 2:4 has a single sparsity, and stands as an open marker.

    Args:
        table: of `storage.storage_table`.
        caption: model, layer and realised sparsity, drawn under the figure.
    """
    dense = table[table.form == "dense"].groupby("dtype", sort=False).bytes.first()
    panels = {size: list(dense.index[dense == size]) for size in sorted(dense.unique(), reverse=True)}
    figure, axes = new_figure(5.2 * len(panels), 4.4, 1, len(panels), sharey=True)
    for ax, names in zip(axes, panels.values(), strict=True):
        shown = table[table.dtype == names[0]]
        for form in shown.form.unique():
            free = shown.pattern != "2:4"
            line = shown[(shown.form == form) & (free if form != "2:4" else ~free)].sort_values("sparsity")
            look = FORM_STYLES[form]
            if form == "2:4":
                look = look | {"linestyle": "none", "markerfacecolor": "none", "markersize": 11, "markeredgewidth": 2}
            ax.plot(100 * line.sparsity, line.ratio, label=form, **look)
        ax.set_title(", ".join(names), fontsize=11)
        ax.set_xlabel("zeros in the weight (%)")
    axes[0].set_ylim(0, 1.05 * table.ratio.max())
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylabel("bytes, relative to dense")
    axes[-1].legend(frameon=False)
    return captioned(figure, caption)


def _log_milliseconds(ax: Axes) -> None:
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
