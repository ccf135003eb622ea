"""Sparsity patterns and exact-count keep-masks: which weights compete, and how many of them go."""

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import NonFiniteError
from sparselab.solvers.checks import as_number, check_tensor, check_whole


@dataclass(frozen=True)
class Unstructured:
    """A fraction of the weights of each comparison group is pruned, wherever they stand.

    Args:
        fraction: of weights pruned, from 0 to 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= as_number("sparsity", self.fraction) <= 1:  # NaN fails too
            raise ValueError(f"sparsity: expected a fraction from 0 to 1, received {self.fraction!s:.60}")

    def __str__(self) -> str:
        return f"{100 * self.fraction:g}%"

    def check(self, d_in: int, blocksize: int) -> None:
        """Any layer and any block will do."""


@dataclass(frozen=True)
class NM:
    """N:M sparsity: `kept` weights survive of every `group` consecutive inputs of a row ("2:4").

    Args:
        kept: weights that survive in each group (the N of recent papers).
        group: consecutive inputs that compete (the M).
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        check_whole("N of a pattern", self.kept)
        check_whole("M of a pattern", self.group)
        if not 0 <= self.kept <= self.group or self.group < 1:
            raise ValueError(f"pattern: expected N:M with 0 ≤ N ≤ M and M ≥ 1, received {self.kept}:{self.group}")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def fraction(self) -> float:
        """Fraction of weights pruned."""
        return 1 - self.kept / self.group

    def check(self, d_in: int, blocksize: int) -> None:
        """Raise ValueError unless M divides the layer's inputs and the block size."""
        for name, size in (("d_in", d_in), ("blocksize", blocksize)):
            if size % self.group:
                raise ValueError(f"pattern {self}: M must divide {name}, received {name} {size}")


Pattern = Unstructured | NM


def parse_sparsity(sparsity: "float | str | Pattern") -> Pattern:
    """A pattern from what users write: 0.5, "0.5", "50%", "2:4", or a pattern already.

    Args:
        sparsity: a fraction of weights pruned (a number of any library), or "N:M" with N of every M weights kept.

    Raises:
        ValueError: not one of these, or outside [0, 1].
        TypeError: an array or tensor of several numbers.
    """
    if isinstance(sparsity, Unstructured | NM):
        return sparsity
    if hasattr(sparsity, "__float__") and not isinstance(sparsity, bool):
        return Unstructured(as_number("sparsity", sparsity))
    if isinstance(sparsity, str):
        if found := re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", sparsity):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"\s*(-?\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", sparsity):
            return Unstructured(float(found[1]) / (100 if found[2] else 1))
    raise ValueError(
        f"sparsity: expected a fraction (0.5), a percentage ('50%') or N:M ('2:4'), received {sparsity!r:.60}"
    )


def pattern_from_counts(sparsity: "float | str | Pattern", prunen: int, prunem: int) -> Pattern:
    """The pattern that the published code's arguments name: `prunen` of every `prunem` weights are *pruned*.

    Args:
        sparsity: what `parse_sparsity` takes, used where both counts are 0.
        prunen: weights pruned in each group.
        prunem: size of a group; 0 means unstructured.

    Raises:
        ValueError: only one of the counts is given, or prunen exceeds prunem; a wrong sparsity.
        TypeError: a count is not a whole number.
    """
    check_whole("prunen", prunen)
    check_whole("prunem", prunem)
    if prunen == 0 and prunem == 0:
        return parse_sparsity(sparsity)
    if not 0 < prunen <= prunem:
        raise ValueError(f"prunen:prunem: expected 0 < prunen ≤ prunem, or both 0, received {prunen}:{prunem}")
    return NM(prunem - prunen, prunem)


def keep_largest(
    scores: Float[Tensor, "*groups size"], sparsity: "float | str | Pattern"
) -> Bool[Tensor, "*groups size"]:
    """The mask that keeps the best scores of each comparison group, pruning exactly as many as the pattern says.

    Along the last dimension `round(fraction · size)` entries are pruned, those with the lowest scores; among equal
    scores the earlier ones go first. For N:M the last dimension is cut into groups of M.

    Args:
        scores: importance, one comparison group a row of the last dimension; higher survives.
        sparsity: what to prune: 0.5, "50%", "2:4" or a pattern.

    Raises:
        ValueError: wrong sparsity, or M does not divide the last dimension.
        NonFiniteError: a score is NaN, which is neither more nor less than another.
    """
    check_tensor("scores", scores)
    if scores.isnan().any():
        raise NonFiniteError("the scores have NaN entries; look at the weights and at the calibration inputs")
    return survivors(scores, parse_sparsity(sparsity))


def survivors(scores: Float[Tensor, "*groups size"], pattern: Pattern) -> Bool[Tensor, "*groups size"]:
    """`keep_largest` without its checks, for scores that come by the thousand from weights already checked."""
    if isinstance(pattern, NM):
        pattern.check(scores.shape[-1], pattern.group)
        groups = scores.unflatten(-1, (-1, pattern.group))
        return ~_lowest(groups, pattern.group - pattern.kept).flatten(-2)
    return ~_lowest(scores, round(pattern.fraction * scores.shape[-1]))


def realised_sparsity(weight: Float[Tensor, "..."]) -> float:
    """Fraction of entries that are exactly zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else math.nan


def _lowest(scores: Float[Tensor, "*groups size"], count: int) -> Bool[Tensor, "*groups size"]:
    """True at exactly `count` entries of each row: the lowest, and of equal ones the earliest."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    places_left = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1) <= places_left))
