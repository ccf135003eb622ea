"""All that results of sweeps can be drawn as."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from sparselab.figures.cost import trade_offs
from sparselab.figures.seeds import curves
from sparselab.results import VARIED, column_of, panels, sets


def found(runs: pd.DataFrame) -> Iterator[Figure]:
    """Curves for each setting that varies, and cost beside quality where methods or patterns do.

    Where some setting has three values or more there are no curves against those that have two: they would be many, of
    two points each.

    Args:
        runs: from `results.read_sweep`.
    """
    values = {x: runs[column_of(x)].nunique() for x in VARIED}
    for x in VARIED:
        for panel in panels(runs, x) if values[x] > 2 or max(values.values()) == 2 else ():
            yield curves(panel.runs, x, panel.caption, panel.measured, panel.dense)
    for some in sets(runs[(runs.failure == "") & runs.perplexity.notna()], "sparsity"):
        if len(some.runs[["method", "pattern"]].drop_duplicates()) > 1:
            yield trade_offs(some.runs, some.caption)
