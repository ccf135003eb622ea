"""Masks beside updates: how much of an error is the mask's, and how much is left under it."""

import pandas as pd
from matplotlib.figure import Figure

from sparselab.figures.style import captioned, new_figure, styles

_PANELS = {"calibration_error": "on calibration tokens", "heldout_error": "on held-out tokens"}
_NAMES = {"none": "none", "sweep": "sweep", "cg": "conjugate gradients", "exact": "exact optimum"}


def mask_update_table(grid: pd.DataFrame, value: str = "calibration_error") -> pd.DataFrame:
    """The numbers of `mask_update_grid`: a row a mask, a column an update, the mean over layers and seeds.

    Args:
        grid: from `analysis.mask_update_grid`.
        value: calibration_error, heldout_error or gap.
    """
    means = grid.groupby(["mask", "update"], sort=False)[value].mean().unstack("update")
    return means.loc[grid["mask"].unique(), grid["update"].unique()]


def mask_update_grid(grid: pd.DataFrame, caption: str) -> Figure:
    """Relative layer error by mask, a line an update, on the tokens calibrated on and on others, on one scale.

    Args:
        grid: from `analysis.mask_update_grid`.
        caption: model, tokens, seeds, drawn under the figure.

    Raises:
        ValueError: no rows.
    """
    if grid.empty:
        raise ValueError("grid: expected rows of mask_update_grid, received none")
    figure, axes = new_figure(10.0, 4.6, 1, 2, sharey=True)
    for ax, (value, title) in zip(axes, _PANELS.items(), strict=True):
        table = mask_update_table(grid, value)
        for update, style in zip(table.columns, styles(), strict=False):
            if update == "exact":  # conjugate gradients come so near that their markers lie inside
                style |= {"markerfacecolor": "none", "markersize": 9}
            ax.plot(table.index, table[update], label=_NAMES.get(update, update), **style)
        ax.set_title(title)
        ax.set_xlabel("mask chosen by")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("relative layer error, mean over layers (log scale)")
    axes[-1].legend(title="weights under it by", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    patterns = ", ".join(grid.pattern.unique())
    return captioned(figure, f"{patterns}, {grid.layer.nunique()} layers; {caption}")
