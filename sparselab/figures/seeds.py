"""Sweeps repeated over seeds: a line a method through the means, in a band from the lowest seed to the highest."""

from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

from sparselab.figures.style import GREY, captioned, method_style, new_figure, scale_note, scale_y, standing_apart
from sparselab.results import SETTING_COLUMNS, TEXT_COLUMNS, Varied, column_of
from sparselab.solvers import NM, parse_sparsity

Measured = Literal["perplexity", "relative_error", "calibration_error", "heldout_error"]

_X_LABELS = {
    "sparsity": "realised sparsity of the pruned layers (%)",
    "percdamp": "percdamp (damping, as a fraction of the mean diagonal of H)",
    "nsamples": "nsamples (calibration windows)",
}
_Y_LABELS = {
    "perplexity": "held-out perplexity",
    "relative_error": "relative layer error, mean over layers",
    "calibration_error": "on calibration tokens",
    "heldout_error": "on held-out tokens",
}
_HALO = withStroke(linewidth=3, foreground="white")  # names stay legible where a line runs below them


def curves(
    runs: pd.DataFrame,
    x: Varied,
    caption: str,
    y: Measured = "perplexity",
    dense: float | None = None,
) -> Figure:
    """Perplexity or layer error against one setting: a line a method, its mean over seeds in a band of their range.

    Against sparsity, N:M patterns stand apart from the lines, as larger markers with names and bars for the range.
    Where runs have failed there is an x on the top edge, with how many of the seeds.

    Args:
        runs: a row a run, as `Workbench.runs` or `results.read_runs` gives them, without a row of the dense
            model; apart from x and the seed, a method's runs have one setting.
        x: what changes along the axis.
        caption: model, tokens, seeds and what is not on the axes, drawn under the figure.
        y: what is measured; on a log axis where it changes more than twofold.
        dense: value of y of the dense model, drawn as a line.

    Raises:
        ValueError: no runs, an unknown x or y, or runs that differ in something else; filter them first.
    """
    figure, (ax,) = new_figure(7.0, 4.8, 1, 1)
    _draw_panel(ax, over_seeds(runs, x, y), x, dense)
    ax.set_ylabel(_Y_LABELS[y] + scale_note(ax))
    return captioned(figure, caption)


def calibration_and_heldout(asked: pd.DataFrame, x: Varied, caption: str) -> Figure:
    """One layer's relative error on the tokens it was calibrated on, and beside it on held-out ones, on one scale.

    Args:
        asked: the table of `analysis.ask_all`, for one layer.
        x, caption: see `curves`.

    Raises:
        ValueError: see `curves`.
    """
    figure, axes = new_figure(10.0, 4.6, 1, 2, sharey=True)
    errors: tuple[Measured, Measured] = ("calibration_error", "heldout_error")
    for ax, y in zip(axes, errors, strict=True):
        _draw_panel(ax, over_seeds(asked, x, y), x, None)
        ax.set_title(_Y_LABELS[y], pad=22 if asked.failure.any() else None)
    axes[0].set_ylabel("relative layer error" + scale_note(axes[0]))
    return captioned(figure, caption)


def over_seeds(
    runs: pd.DataFrame,
    x: Varied,
    y: Measured = "perplexity",
) -> pd.DataFrame:
    """The numbers that `curves` draws, a row a point.

    Args, Raises: see `curves`.

    Returns:
        method; pattern, percdamp or nsamples; at, the place on the x axis (realised sparsity in %, or for a failed
        run what its pattern asks for); seeds; failed, how many of them; mean, min and max of y over the others.
    """
    _check(runs, x, y)
    varied = column_of(x)
    failed = runs["failure"].fillna("").ne("") if "failure" in runs else runs[y].isna()
    shown = runs.reindex(columns=["method", varied, y]).assign(failed=failed, at=runs.get(x))
    table = shown.groupby(["method", varied], sort=False).agg(
        at=("at", "mean"), seeds=("failed", "size"), failed=("failed", "sum"),
        mean=(y, "mean"), min=(y, "min"), max=(y, "max"),
    ).reset_index()  # fmt: skip
    if x == "sparsity":
        asked = table.pattern.map(lambda pattern: parse_sparsity(pattern).fraction)
        table["at"] = 100 * table["at"].astype(float).fillna(asked)
    order = {method: number for number, method in enumerate(runs.method.unique())}
    return table.sort_values("at", kind="stable").sort_values(
        "method", key=lambda names: names.map(order), kind="stable", ignore_index=True
    )


def _check(runs: pd.DataFrame, x: str, y: str) -> None:
    for name, value, known in (("x", x, _X_LABELS), ("y", y, _Y_LABELS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, received {value!r}")
    if runs.empty:
        raise ValueError("runs: expected a row a run, received none")
    fixed = [name for name in SETTING_COLUMNS if name != column_of(x)]
    for part, names in ((runs, TEXT_COLUMNS), *((rows, fixed) for _, rows in runs.groupby("method"))):
        for name in runs.columns.intersection(list(names)):
            values = part[name].astype(str).unique()
            if len(values) > 1:
                raise ValueError(f"runs: expected one {name} along {x}, received {', '.join(values)}; choose one")


def _is_grouped(pattern: str) -> bool:
    return isinstance(parse_sparsity(pattern), NM)


def _draw_panel(ax: Axes, table: pd.DataFrame, x: Varied, dense: float | None) -> None:
    if dense is not None:
        ax.axhline(dense, color=GREY, linestyle=(0, (1, 1)), label=f"dense ({dense:.2f})")
    apart = table.pattern.map(_is_grouped).astype(bool) if x == "sparsity" else table.method.isna()
    for method in table.method.unique():
        of_method = table.method == method
        _draw_line(ax, table[of_method & ~apart], method)
        _draw_apart(ax, table[of_method & apart], method)
    if apart.any():
        _name_apart(ax, table[apart])
    scale_y(ax, [*table["min"].dropna(), *table["max"].dropna(), *([] if dense is None else [dense])])
    _scale_x(ax, x, sorted(table["at"].unique()))
    ax.set_xlabel(_X_LABELS[x])
    _draw_failures(ax, table[table.failed > 0])
    ax.legend(facecolor="white", framealpha=0.9, edgecolor="none", handlelength=3)


def _draw_line(ax: Axes, points: pd.DataFrame, method: str) -> None:
    if points["mean"].notna().any():
        style = method_style(method)
        ax.plot(points["at"], points["mean"], label=method, **style)
        ax.fill_between(points["at"], points["min"], points["max"], color=style["color"], alpha=0.2, linewidth=0)


def _draw_apart(ax: Axes, points: pd.DataFrame, method: str) -> None:
    style = standing_apart(method_style(method))
    for _, point in points[points["mean"].notna()].iterrows():
        at, mean = point["at"], point["mean"]
        ax.errorbar(at, mean, [[mean - point["min"]], [point["max"] - mean]], capsize=3, **style)


def _name_apart(ax: Axes, points: pd.DataFrame) -> None:
    """Each pattern's name once, beside its highest marker; patterns of one sparsity take turns between the sides."""
    highest = points.dropna(subset="mean").sort_values("mean").drop_duplicates("pattern", keep="last")
    for number, (_, point) in enumerate(highest.iterrows()):
        side, align = ((9, "left"), (-9, "right"))[number % 2]
        look: dict[str, Any] = {"fontsize": 8, "ha": align, "va": "center", "path_effects": [_HALO]}
        ax.annotate(point["pattern"], (point["at"], point["mean"]), (side, 0), textcoords="offset points", **look)


def _draw_failures(ax: Axes, points: pd.DataFrame) -> None:
    """An x on the top edge for each point, with how many of its seeds failed."""
    top = ax.get_xaxis_transform()
    for _, point in points.iterrows():
        colour = method_style(point["method"])["color"]
        ax.plot(point["at"], 1, marker="x", markersize=9, markeredgewidth=2, color=colour, transform=top, clip_on=False)
        text = "failed" if point["failed"] == point["seeds"] else f"{point['failed']} of {point['seeds']} failed"
        ax.annotate(text, (point["at"], 1), (0, 8), xycoords=top, textcoords="offset points", ha="center", fontsize=8)
    if len(points):
        ax.plot([], [], "x", color=GREY, markersize=8, markeredgewidth=2, label="failed")


def _scale_x(ax: Axes, x: str, places: list[float]) -> None:
    """Tens of percent; or a tick at each value on a log scale, which starts linear if a value is 0."""
    ax.margins(x=0.08)
    if x == "sparsity":
        ax.xaxis.set_major_locator(MultipleLocator(10))
        return
    smallest = min((place for place in places if place > 0), default=1.0)
    if 0 in places:
        ax.set_xscale("symlog", linthresh=smallest)
    else:
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
