"""Grids of few values that weights are rounded to: one for each output row, from its lowest weight to its highest."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.solvers.checks import check_whole

_MOST_BITS = 16


@dataclass(frozen=True)
class Grid:
    """The values step · (k − zero) for k from 0 to `top`, for each row. Zero is always one of them.

    Args:
        step: between neighbouring values of a row.
        zero: the whole number k that stands for 0.
        top: the largest k, 2^bits − 1.
    """

    step: Float[Tensor, " rows"]
    zero: Float[Tensor, " rows"]
    top: int

    def round(self, values: Float[Tensor, "*columns rows"]) -> Float[Tensor, "*columns rows"]:
        """The nearest values of each row's grid; rows are the last dimension."""
        return ((values / self.step).round_() + self.zero).clamp_(0, self.top).sub_(self.zero).mul_(self.step)


def row_grids(weight: Float[Tensor, "rows d_in"], wbits: int) -> Grid:
    """The asymmetric grid of each row: from its lowest weight, or 0 if that is less, to its highest, or 0.

    Args:
        weight: dense, in the precision of the work.
        wbits: bits a weight.

    Raises:
        TypeError, ValueError: wbits is not a whole number of bits that makes a grid.
    Source: Frantar & Alistarh 2023, section 3.5, and the published code's quantiser of rows.
    """
    check_wbits(wbits)
    top = 2**wbits - 1
    low, high = weight.amin(dim=1).clamp(max=0), weight.amax(dim=1).clamp(min=0)
    step = (high - low) / top
    step = torch.where(step > 0, step, 1)  # a row of zeros
    return Grid(step, (-low / step).round(), top)


def check_wbits(wbits: Any) -> None:
    """A number of bits that makes a grid of several values, or an error."""
    check_whole("wbits", wbits, 1)
    if wbits > _MOST_BITS:
        raise ValueError(f"wbits: expected at most {_MOST_BITS}, received {wbits}")
