"""SparseGPT at work on a few weights: one step of its column sweep, several steps in a row, the factor it uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from sparselab.figures.style import GREY, captioned, new_figure, styles

# Zero is white, and the two signs differ to any colour vision.
SIGNED = "PuOr"
OUTLINE = "#000000"


@dataclass(frozen=True)
class Frame:
    """What one step of the sweep shows.

    Args:
        column: the column this step dealt with.
        start: first column of the group in play.
        weight: after the step.
        pruned: weights that are gone.
        marked: weights that lost the competition of their group and go when their column's turn comes.
        scores: w²/U_qq² of the group in play, from `start` on.
        compensation: what this step added to later columns.
    """

    column: int
    start: int
    weight: Float[np.ndarray, "d_out d_in"]
    pruned: Bool[np.ndarray, "d_out d_in"]
    marked: Bool[np.ndarray, "d_out d_in"]
    scores: Float[np.ndarray, "d_out group"]
    compensation: Float[np.ndarray, "d_out d_in"]


def sweep_step(frames: Sequence[Frame], step: int, errors: pd.DataFrame, caption: str) -> Figure:
    """One step: the scores that decided, what moved to the right, the weights as they now are, the error so far.

    Colour scales are those of the whole sweep, so that steps can be compared.

    Args:
        frames: all steps of a sweep.
        step: which of them to draw.
        errors: one row a step: column, sweep and optimum (relative errors of the sweep, and of the best weights with
            the same mask).
        caption: model, layer, tokens, seed and realised sparsity, drawn under the figure.
    """
    # A fixed layout takes half the time of one that is measured, and does not jump from step to step.
    grid = {"left": 0.05, "right": 0.97, "bottom": 0.11, "top": 0.9, "wspace": 0.13, "hspace": 0.24}
    figure, (scores, moved, weights, error) = new_figure(11.5, 7.0, 2, 2, gridspec_kw=grid)
    figure.set_layout_engine("none")
    frame = frames[step]
    _draw_scores(scores, frames, frame)
    _draw_compensation(moved, frames, frame)
    _draw_weights(weights, frames, frame)
    _draw_errors(error, errors, step)
    for ax, title in (
        (scores, "1. Scores $w^2/U_{qq}^2$ of the group in play"),
        (moved, f"2. What column {frame.column} changes to its right"),
        (weights, f"3. Weights after column {frame.column}"),
        (error, "4. Relative error so far (%)"),
    ):
        ax.set_title(title, fontsize=11, loc="left", pad=8)
    for ax in (scores, weights):
        ax.set_ylabel("output row")
    for ax in (weights, error):
        ax.set_xlabel("input column of the slice")
    scores.tick_params(labelbottom=False)
    moved.tick_params(labelbottom=False, labelleft=False)
    figure.legend(handles=_legend(), loc="upper center", ncols=4, frameon=False, fontsize=9)
    lines = fill(caption, 170)  # here, as matplotlib takes long to wrap
    captioned(figure, lines).supxlabel(lines, fontsize=8, wrap=False)
    return figure


def sweep_strip(frames: Sequence[Frame], steps: Sequence[int], caption: str) -> Figure:
    """Chosen steps side by side: the weights above, what each step moved to the right below.

    Args:
        frames: all steps of a sweep.
        steps: which of them to draw, in this order.
        caption: model, layer, tokens, seed and realised sparsity, drawn under the figure.
    """
    figure, axes = new_figure(3.1 * len(steps) + 0.8, 5.6, 2, len(steps), sharex=True, sharey=True)
    above, below = axes[: len(steps)], axes[len(steps) :]
    for top, bottom, step in zip(above, below, steps, strict=True):
        weights = _draw_weights(top, frames, frames[step], bar=False)
        moved = _draw_compensation(bottom, frames, frames[step], bar=False)
        top.set_title(f"column {frames[step].column} done", fontsize=11)
        bottom.set_xlabel("input column")
    for row, image, name in ((above, weights, "weight"), (below, moved, "change")):
        row[0].set_ylabel("output row")
        figure.colorbar(image, ax=row, label=name, pad=0.01, extend="neither" if row is above else "both")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return captioned(figure, caption)


def factor_maps(hessian: Float[np.ndarray, "d d"], V: Float[np.ndarray, "d d"], caption: str) -> Figure:
    """H + λI, its factor V, the inverse U = V⁻¹, and what a weight's square is multiplied by in three scores.

    Args:
        hessian: damped, H + λI = V Vᵀ.
        V: upper triangular.
        caption: model, layer, tokens and seed, drawn under the figure.
    """
    figure, (first, second, third, factors) = new_figure(11.5, 7.6, 2, 2)
    U = np.linalg.inv(V)
    for ax, matrix, title in (
        (first, hessian, r"$H+\lambda I$"),
        (second, np.where(np.tri(len(V), k=-1), np.nan, V), r"$V$, upper: $VV^\top = H+\lambda I$"),
        (third, np.where(np.tri(len(V), k=-1), np.nan, U), r"$U = V^{-1}$: $U^\top U = (H+\lambda I)^{-1}$"),
    ):
        most = float(np.nanmax(np.abs(matrix)))
        image = _heat_map(ax, matrix, cmap=SIGNED, norm=SymLogNorm(most / 10, vmin=-most, vmax=most))
        ax.set_title(title, fontsize=11)
        figure.colorbar(image, ax=ax, label="symmetric log scale")
    _draw_multipliers(factors, hessian, V, U)
    return captioned(figure, caption)


def _draw_multipliers(
    ax: Axes, hessian: Float[np.ndarray, "d d"], V: Float[np.ndarray, "d d"], U: Float[np.ndarray, "d d"]
) -> None:
    """What the square of a weight of each column is multiplied by: with no, some and all other columns compensating."""
    columns = np.arange(len(V))
    lines = {
        r"$H_{qq}$: nothing compensates (Wanda²)": hessian.diagonal(),
        r"$V_{qq}^2 = 1/U_{qq}^2$: the columns after q do (SparseGPT)": V.diagonal() ** 2,
        r"$1/[H^{-1}]_{qq}$: all other columns do (OBS)": 1 / (U * U).sum(axis=0),
    }
    for (label, values), style in zip(lines.items(), styles(), strict=False):
        ax.plot(columns, values, label=label, **style)
    ax.set_yscale("log")
    ax.set_title("what $w_q^2$ is multiplied by", fontsize=11)
    ax.set_xlabel("column q")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(top=8 * ax.get_ylim()[1])
    ax.legend(fontsize=8, loc="upper left", frameon=False)


def _draw_weights(ax: Axes, frames: Sequence[Frame], frame: Frame, bar: bool = True) -> AxesImage:
    image = _heat_map(ax, frame.weight, bar, cmap=SIGNED, norm=_symmetric([each.weight for each in frames], 1.0))
    _mark(ax, frame.pruned, "x")
    _mark(ax, frame.marked, "o")
    _outline(ax, frame.column, 1, len(frame.weight))
    return image


def _draw_compensation(ax: Axes, frames: Sequence[Frame], frame: Frame, bar: bool = True) -> AxesImage:
    norm = _symmetric([each.compensation for each in frames], 0.97)
    # The columns done do not move any more: shown as not there, not as a change of zero.
    shown = np.where(np.arange(frame.weight.shape[1]) > frame.column, frame.compensation, np.nan)
    image = _heat_map(ax, shown, cmap=SIGNED, norm=norm)
    if bar:
        ax.figure.colorbar(image, ax=ax, pad=0.02, extend="both")
    source = np.zeros_like(frame.pruned)
    source[:, frame.column] = frame.pruned[:, frame.column]
    _mark(ax, source, "x")
    _outline(ax, frame.column, 1, len(frame.weight))
    return image


def _draw_scores(ax: Axes, frames: Sequence[Frame], frame: Frame) -> None:
    positive = np.concatenate([each.scores[each.scores > 0] for each in frames])
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    shown = np.full_like(frame.weight, np.nan)
    group = slice(frame.start, frame.start + frame.scores.shape[1])
    shown[:, group] = np.maximum(frame.scores, low)
    _heat_map(ax, shown, True, cmap="viridis", norm=LogNorm(low, max(high, 1.01 * low)))
    lost = np.zeros_like(frame.pruned)
    lost[:, group] = (frame.pruned | frame.marked)[:, group]
    _mark(ax, lost & frame.pruned, "x")
    _mark(ax, lost & frame.marked, "o")
    _outline(ax, frame.start, frame.scores.shape[1], len(frame.weight), linestyle=(0, (3, 2)), linewidth=1.4)
    _outline(ax, frame.column, 1, len(frame.weight))


def _draw_errors(ax: Axes, errors: pd.DataFrame, step: int) -> None:
    labels = {"sweep": "the sweep", "optimum": "best weights with the mask so far"}
    for (name, label), style in zip(labels.items(), styles(), strict=False):
        ax.plot(errors.column, 100 * errors[name], label=label, **style)
    ax.axvline(errors.column[step], color=GREY, linewidth=1)
    ax.set_ylim(0, max(115 * errors.sweep.max(), 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper left", facecolor="white", framealpha=1, edgecolor="none")


def _heat_map(ax: Axes, matrix: Float[np.ndarray, "rows columns"], bar: bool = False, **look: Any) -> AxesImage:
    """Cells in colour; those without a value are hatched grey."""
    ax.grid(visible=False)
    rows, columns = matrix.shape
    whole = Rectangle((-0.5, -0.5), columns, rows, facecolor="#e6e6e6", edgecolor="#c4c4c4", hatch="///", linewidth=0)
    ax.add_patch(whole)
    image = ax.imshow(matrix, aspect="auto", interpolation="none", **look)
    image.set_zorder(2)
    for axis, most in ((ax.xaxis, 8), (ax.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(most, integer=True))
    if bar:
        ax.figure.colorbar(image, ax=ax, pad=0.02).minorticks_off()
    return image


def _mark(ax: Axes, where: Bool[np.ndarray, "rows columns"], marker: str) -> None:
    """A marker on each cell that is True, legible on dark and on light."""
    rows, columns = np.nonzero(where)
    for colour, width in (("white", 3.0), (OUTLINE, 1.3)):
        look: dict[str, Any] = {"marker": marker, "markerfacecolor": "none", "markeredgecolor": colour}
        ax.plot(columns, rows, linestyle="none", markeredgewidth=width, zorder=3, **look)


def _outline(ax: Axes, first: int, width: int, rows: int, **look: Any) -> None:
    look = {"linewidth": 2.4} | look
    ax.add_patch(
        Rectangle((first - 0.5, -0.5), width, rows, fill=False, edgecolor=OUTLINE, zorder=4, clip_on=False, **look)
    )


def _symmetric(matrices: Sequence[Float[np.ndarray, "rows columns"]], share: float) -> Normalize:
    """A scale around zero that holds this share of the entries that are not zero; the rest get its end colours."""
    sizes = np.abs(np.concatenate([matrix[matrix != 0] for matrix in matrices]))
    most = float(np.quantile(sizes, share)) if sizes.size else 1.0
    return Normalize(-most, most)


def _legend() -> list[Any]:
    look: dict[str, Any] = {"linestyle": "none", "color": OUTLINE, "markerfacecolor": "none"}
    return [
        Patch(fill=False, edgecolor=OUTLINE, linewidth=2.4, label="column of this step"),
        Line2D([], [], marker="x", label="pruned", **look),
        Line2D([], [], marker="o", label="will be, when its turn comes", **look),
        Patch(facecolor="#e6e6e6", edgecolor="#c4c4c4", hatch="///", label="done, or not in play"),
    ]
