"""Sparsity patterns and exact-count keep-masks: which weights compete, and how many of them go."""

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """A fraction of the weights of each comparison group is pruned, wherever they stand.

    Args:
        fraction: of weights pruned, from 0 to 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:  # NaN fails too
            raise ValueError(f"sparsity: expected a fraction from 0 to 1, received {self.fraction}")

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
        sparsity: a fraction of weights pruned, or "N:M" with N of every M weights kept.

    Raises:
        ValueError: not one of these, or outside [0, 1].
    """
    if isinstance(sparsity, Unstructured | NM):
        return sparsity
    if isinstance(sparsity, int | float) and not isinstance(sparsity, bool):
        return Unstructured(float(sparsity))
    if isinstance(sparsity, str):
        if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", sparsity):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"\s*(-?\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", sparsity):
            return Unstructured(float(found[1]) / (100 if found[2] else 1))
    raise ValueError(f"sparsity: expected a fraction (0.5), a percentage ('50%') or N:M ('2:4'), received {sparsity!r}")


def pattern_from_counts(sparsity: float, prunen: int, prunem: int) -> Pattern:
    """The pattern that the published code's arguments name: `prunen` of every `prunem` weights are *pruned*.

    Args:
        sparsity: fraction pruned, used where both counts are 0.
        prunen: weights pruned in each group.
        prunem: size of a group; 0 means unstructured.

    Raises:
        ValueError: only one of the counts is given, or prunen exceeds prunem.
    """
    if prunen == 0 and prunem == 0:
        return Unstructured(float(sparsity))
    if not 0 < prunen <= prunem:
        raise ValueError(f"prunen:prunem: expected 0 < prunen ≤ prunem, or both 0, received {prunen}:{prunem}")
    return NM(prunem - prunen, prunem)


def keep_largest(scores: Float[Tensor, "*groups size"], pattern: Pattern) -> Bool[Tensor, "*groups size"]:
    """The mask that keeps the best scores of each comparison group, pruning exactly as many as the pattern says.

    Along the last dimension `round(fraction · size)` entries are pruned, those with the lowest scores; among equal
    scores the earlier ones go first. For N:M the last dimension is cut into groups of M.

    Args:
        scores: importance, one comparison group a row of the last dimension; higher survives.
        pattern: what to prune.

    Raises:
        ValueError: M does not divide the last dimension.
    """
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
