"""One layer: its mask, its error, what decided, and the Hessian behind it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from numpy import ndarray

from sparselab.figures.style import GREY, captioned, log_ticks, method_style

_CROP = 64
_POINTS = 1200


@dataclass(frozen=True)
class LayerPicture:
    """What the layer figure shows, all on the CPU.

    Args:
        method: the method whose mask is shown.
        keep: its mask, True where a weight survives.
        magnitude: |W| of the dense weight.
        feature_norm: ‖X_j‖₂ of each input.
        boundaries: per method, the magnitude at which each input is cut (`analysis.effective_boundary`).
        errors: rows by method, columns "calibration" and "held-out": relative layer errors.
        error_by_output: per method, each output's share of the relative error on held-out tokens.
        eigenvalues: of the undamped Hessian, from the largest down.
        damping: λ, in the units of the eigenvalues.
        agreement: methods by methods, intersection over union of the kept weights.
    """

    method: str
    keep: Bool[ndarray, "d_out d_in"]
    magnitude: Float[ndarray, "d_out d_in"]
    feature_norm: Float[ndarray, " d_in"]
    boundaries: dict[str, Float[ndarray, " d_in"]]
    errors: pd.DataFrame
    error_by_output: dict[str, Float[ndarray, " d_out"]]
    eigenvalues: Float[ndarray, " d_in"]
    damping: float
    agreement: pd.DataFrame


def layer_lab(picture: LayerPicture, caption: str) -> Figure:
    """Six panels about one layer; drawn with fixed margins, since working them out takes longer than drawing.

    Args:
        picture: what to show.
        caption: model, layer, tokens, seed and realised sparsity.
    """
    figure = Figure(figsize=(12.0, 7.2))
    grid = figure.add_gridspec(2, 3, left=0.06, right=0.985, top=0.92, bottom=0.12, wspace=0.27, hspace=0.42)
    mask = grid[0, 0].subgridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.06, hspace=0.08)
    _draw_mask([figure.add_subplot(mask[place]) for place in ((1, 0), (0, 0), (1, 1))], picture)
    rest = [figure.add_subplot(grid[place]) for place in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2))]
    for ax, draw in zip(
        rest, (_draw_errors, _draw_outputs, _draw_scatter, _draw_spectrum, _draw_agreement), strict=True
    ):
        ax.spines[["top", "right"]].set_visible(False)
        draw(ax, picture)
    return captioned(figure, caption)


def _draw_mask(axes: list[Axes], picture: LayerPicture) -> None:
    """A corner of the mask, and the share of survivors by input and by output over the whole layer."""
    ax, above, beside = axes
    corner = picture.keep[:_CROP, :_CROP]
    ax.imshow(corner, cmap="Greys", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
    ax.set_xlabel(f"input (first {corner.shape[1]} of {picture.keep.shape[1]})")
    ax.set_ylabel(f"output (first {corner.shape[0]} of {picture.keep.shape[0]})")
    above.plot(picture.keep.mean(axis=0)[: corner.shape[1]], color=GREY, linewidth=1, drawstyle="steps-mid")
    beside.plot(picture.keep.mean(axis=1)[: corner.shape[0]], range(len(corner)), color=GREY, linewidth=1)
    above.set(xlim=(-0.5, corner.shape[1] - 0.5), ylim=(0, 1), xticks=[], yticks=[0, 1])
    beside.set(ylim=(len(corner) - 0.5, -0.5), xlim=(0, 1), yticks=[], xticks=[0, 1])
    for marginal in (above, beside):
        marginal.spines[["top", "right"]].set_visible(False)
    _title(above, f"{picture.method}: kept weights (dark), and their share")


def _draw_errors(ax: Axes, picture: LayerPicture) -> None:
    for place, (method, row) in enumerate(picture.errors.iterrows()):
        colour = method_style(str(method))["color"]
        ax.plot([row["calibration"], row["held-out"]], [place, place], color=colour, linewidth=1)
        ax.plot(row["calibration"], place, "o", color=colour, markersize=8)
        ax.plot(row["held-out"], place, "D", color=colour, markersize=8, markerfacecolor="white")
    ax.plot([], [], "o", color=GREY, label="calibration tokens")
    ax.plot([], [], "D", color=GREY, markerfacecolor="white", label="held-out tokens")
    names = [f"▸ {name}" if name == picture.method else str(name) for name in picture.errors.index]
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.08 * max(np.nanmax(picture.errors, initial=0.0), 1e-9)))
    _title(ax, "relative layer error")
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_outputs(ax: Axes, picture: LayerPicture) -> None:
    for method, shares in picture.error_by_output.items():
        style = method_style(method) | {"marker": ""}
        ax.plot(np.sort(shares)[::-1], label=method, linewidth=2.2 if method == picture.method else 1.2, **style)
    ax.set(yscale="log", xlabel="output, worst first")
    _title(ax, "where the error sits: share by output")
    ax.legend(frameon=False, fontsize=8)


def _draw_scatter(ax: Axes, picture: LayerPicture) -> None:
    """A sample of weights in the plane that Wanda decides in, and where each method cuts."""
    draw = np.random.default_rng(0)
    places = draw.choice(picture.magnitude.size, min(_POINTS, picture.magnitude.size), replace=False)
    norm = np.broadcast_to(picture.feature_norm, picture.magnitude.shape).reshape(-1)[places]
    size, kept = picture.magnitude.reshape(-1)[places], picture.keep.reshape(-1)[places]
    ax.plot(norm[~kept], size[~kept], "x", color="#bbbbbb", markersize=3, label="pruned")
    ax.plot(norm[kept], size[kept], ".", color=GREY, markersize=3, label="kept")
    alive = np.flatnonzero(picture.feature_norm > 0)
    groups = np.array_split(alive[np.argsort(picture.feature_norm[alive])], min(24, max(1, len(alive))))
    for method, boundary in picture.boundaries.items():
        line = [(np.median(picture.feature_norm[group]), np.median(boundary[group])) for group in groups if len(group)]
        style = method_style(method) | {"marker": ""}
        ax.plot(*np.array(line).reshape(-1, 2).T, linewidth=2, label=method, **style)
    ax.set(xscale="log", yscale="log", xlabel="feature norm ‖X_j‖₂", ylabel="|W|")
    _title(ax, "where each method cuts")
    ax.set_ylim(bottom=max(float(np.median(picture.magnitude)) / 100, 1e-12))
    for axis in (ax.xaxis, ax.yaxis):
        _log(axis)
    ax.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)


def _draw_spectrum(ax: Axes, picture: LayerPicture) -> None:
    values, damping = picture.eigenvalues, picture.damping
    shown = values[values > values[0] * 1e-12] if len(values) else values
    ax.plot(shown, color="#0072B2", label="eigenvalues of H")
    ax.axhline(max(damping, 1e-30), color="#D55E00", linestyle="--", label="damping λ")
    before = values[0] / values[-1] if values[-1] > 0 else np.inf
    after = (values[0] + damping) / (values[-1] + damping)
    _title(ax, f"condition number {before:.1e} → {after:.1e}")
    ax.set(yscale="log", xlabel="eigenvalue, largest first", xlim=(0, max(1, len(values))))
    _log(ax.yaxis)
    ax.legend(frameon=False, fontsize=8)


def _draw_agreement(ax: Axes, picture: LayerPicture) -> None:
    table = picture.agreement
    ax.imshow(table, cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    ax.set_xticks(range(len(table)), table.columns)
    ax.set_yticks(range(len(table)), table.index)
    _title(ax, "agreement of the masks (IoU)")


def _log(axis: Axis) -> None:
    """Few ticks: they cost most of the drawing."""
    log_ticks(axis, (1,), numticks=6)


def _title(ax: Axes, text: str) -> None:
    """A title at a fixed height: finding one that clears all ticks is a quarter of the drawing."""
    ax.set_title(text, y=1.02)
