"""How sure a number is: intervals of means, and differences between models measured on the same windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparselab.evaluation import Perplexity

NOT_DISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, written "−0.0962 ± 0.0036".

    Args:
        mean: the middle.
        half_width: from the middle to either end; NaN where a single value leaves it unknown.
    """

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out zero; not where its width is unknown."""
        return abs(self.mean) > self.half_width

    @property
    def in_words(self) -> str:
        """For tables: the numbers, or "not distinguishable" where the interval includes zero."""
        return str(self) if self.distinguishable else NOT_DISTINGUISHABLE

    def __str__(self) -> str:
        known = 0 < self.half_width < math.inf
        digits = max(0, 1 - math.floor(math.log10(self.half_width))) if known else 4  # two that count
        return f"{self.mean:z.{digits}f} ± {self.half_width:.{digits}f}".replace("-", "−")


@cache
def t95(freedom: int) -> float:
    """97.5% of Student's distribution lies below: t = √ν·tan θ, and the density of θ is proportional to cos^(ν−1) θ.

    Args:
        freedom: degrees of freedom ν, from 1 on.
    """
    furthest = min(math.pi / 2, 10 / math.sqrt(freedom))  # beyond, the density is below 1e-21 of its peak
    angle = torch.linspace(0, furthest, 10**6, dtype=torch.float64)
    below = angle.cos().pow(freedom - 1).cumsum(0)
    return math.sqrt(freedom) * math.tan(angle[int((below < 0.95 * below[-1]).sum())])


def interval95(values: Float[Tensor, " n"]) -> Interval:
    """Mean of independent values with its 95% interval, by Student's t.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("values: expected at least one, received none")
    return _mean(values.double()).interval


def difference(
    first: Perplexity | Sequence[Perplexity],
    second: Perplexity | Sequence[Perplexity],
) -> Interval:
    """Log perplexity of the first minus that of the second, with its 95% interval, paired window by window.

    Windows differ far more from each other than models do on one window, so the interval is that of the mean of
    D[seed, window], the differences of the losses, and much narrower than those of the two perplexities. exp of the
    difference is the ratio of the perplexities.

    With one pair the variance is that over windows, divided by their number. Such an interval knows of the evaluation
    text only: another calibration draw, or another training run, may give a difference outside of it.

    With replicates by seed, windows and seeds both are draws, crossed: each window is read under each seed. Then

        half width² = (half width of the seeds' mean, over windows)² + (half width of the windows' mean, over seeds)²

    and the variance of the mean adds up likewise. Each part takes Student's t of its own number of draws. One t for the
    sum, with Satterthwaite's degrees of freedom, was tried: of 2 seeds that decide as much as the windows do, it
    covers 87% where it says 95%; with the smaller number of degrees of freedom, 2 seeds that do not matter make the
    interval six times as wide. What is of neither windows nor seeds alone (windows that one seed happens to suit) is
    in both parts, so the interval is a little wide.

    Args:
        first, second: measured on the same windows; each one perplexity, or one a seed, in the same order of seeds.

    Raises:
        TypeError: not perplexities.
        ValueError: none at all, as many of one as not of the other, or other windows.
    """
    firsts, seconds = _as_replicates("first", first), _as_replicates("second", second)
    if len(firsts) != len(seconds):
        raise ValueError(
            f"second: expected one perplexity for each of the first's {len(firsts)}, received {len(seconds)}; "
            "they are paired by seed"
        )
    for one in (*firsts, *seconds):
        _check_windows(one, firsts[0])
    return _crossed(torch.stack([a.nll - b.nll for a, b in zip(firsts, seconds, strict=True)])).interval


def pooled(replicates: Sequence[Perplexity]) -> tuple[float, float]:
    """Perplexity over replicates by seed: exp of the mean loss over seeds and windows, and its standard error.

    The mean of losses, not of perplexities, so that the logarithm of a ratio of two of them is their `difference`.

    Args:
        replicates: one a seed, on the same windows. The error of a single one is its own; that of several takes in the
            variance over seeds, see `difference`.

    Raises:
        TypeError, ValueError: see `difference`.
    """
    several = _as_replicates("replicates", replicates)
    if len(several) == 1:
        return float(several[0]), several[0].stderr
    for one in several:
        _check_windows(one, several[0])
    mean = _crossed(torch.stack([one.nll for one in several]))
    return math.exp(mean.value), math.exp(mean.value) * math.sqrt(mean.variance)


class _Mean(NamedTuple):
    """An estimated mean, the variance of that estimate, and half of its 95% interval."""

    value: float
    variance: float
    half_width: float

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.half_width)


def _mean(values: Float[Tensor, " n"]) -> _Mean:
    count, value = len(values), float(values.mean())
    if count == 1:
        return _Mean(value, math.nan, math.nan)
    variance = float(values.var()) / count
    return _Mean(value, variance, t95(count - 1) * math.sqrt(variance))


def _crossed(table: Float[Tensor, "seeds windows"]) -> _Mean:
    """The mean of a table whose rows and columns are both draws; see `difference`."""
    by_window = _mean(table.mean(dim=0))
    if len(table) == 1:
        return by_window
    by_seed = _mean(table.mean(dim=1))
    half_width = math.hypot(by_window.half_width, by_seed.half_width)
    return _Mean(by_seed.value, by_window.variance + by_seed.variance, half_width)


def _as_replicates(name: str, given: Any) -> list[Perplexity]:
    several = [given] if isinstance(given, Perplexity) else list(given) if isinstance(given, Sequence) else None
    if several is None or not all(isinstance(one, Perplexity) for one in several):
        kind = type(given).__name__
        raise TypeError(f"{name}: expected what perplexity gives, or one for each seed, received {kind}")
    if not several:
        raise ValueError(f"{name}: expected at least one perplexity, received none")
    return several


def _check_windows(one: Perplexity, like: Perplexity) -> None:
    if (len(one.nll), one.seqlen) != (len(like.nll), like.seqlen):
        raise ValueError(
            f"expected perplexities on the same windows, received {len(like.nll)} windows of {like.seqlen} tokens "
            f"and {len(one.nll)} of {one.seqlen}"
        )
