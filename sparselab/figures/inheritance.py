"""Where the error of a pruned model comes from: made in each block, or inherited, by depth."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparselab.figures.style import captioned, log_ticks, new_figure, styles

PARTS = {
    "total": "total:\nthe pruned model",
    "inherited": "inherited: the dense block\non the pruned model's inputs",
    "local": "local: the pruned block\non the dense model's inputs",
}


def block_errors(table: pd.DataFrame, caption: str) -> Figure:
    """Local, inherited and total error of each block's outputs by depth, one scale for all.

    The scale is logarithmic where there is an error at all; a block that inherits none has no point on it.

    Args:
        table: of `inheritance.block_errors`; several of them one after another, told apart by a column `method`, get a
            panel each.
        caption: model, tokens and realised sparsity, drawn under the figure.
    """
    shown = table if "method" in table else table.assign(method="")
    methods = list(shown.method.unique())
    scale = "log" if (shown[list(PARTS)] > 0).to_numpy().any() else "linear"
    figure, axes = new_figure(4.0 * len(methods) + 2.0, 4.4, 1, len(methods), sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        panel = shown[shown.method == method]
        for (part, label), style in zip(PARTS.items(), styles(), strict=False):
            errors = panel[part].where(panel[part] > 0) if scale == "log" else panel[part]
            ax.plot(panel.block, errors, label=label, **style)
        ax.set_title(method)
        ax.set_xlabel("block")
        ax.set_yscale(scale)
        if scale == "log":
            log_ticks(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(f"squared error of a block's outputs,\nrelative to the dense ones ({scale} scale)")
    axes[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=1.2)
    return captioned(figure, caption)
