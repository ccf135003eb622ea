"""Student's interval of a mean, as the checks of a study go by it."""

import math
from functools import cache

import torch
from torch import Tensor

Interval = tuple[float, float]


def interval95(values: Tensor) -> Interval:
    """Mean and half width of the 95% interval of independent values."""
    values = values.double()
    return float(values.mean()), t95(len(values) - 1) * float(values.std()) / math.sqrt(len(values))


@cache
def t95(freedom: int) -> float:
    """97.5% of Student's distribution lies below: t = √ν·tan θ, and the density of θ is proportional to cos^(ν−1) θ."""
    angle = torch.linspace(0, math.pi / 2, 10**6, dtype=torch.float64)
    below = angle.cos().pow(freedom - 1).cumsum(0)
    return math.sqrt(freedom) * math.tan(angle[int((below < 0.95 * below[-1]).sum())])
