"""Sparsity patterns and exact-count keep-masks: which weights compete, and how many of them go."""

import math
import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sparselab.errors import NonFiniteError
from sparselab.solvers.checks import as_number, check_blocksize, check_keep, check_tensor, check_whole

# Groups of so few entries are ranked entry by entry, over all groups at once; a single large one by a sample.
_FEW, _SAMPLE = 16, 2**13


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
    def pruned(self) -> int:
        """Weights that go of each group."""
        return self.group - self.kept

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
        return ~lowest(groups, pattern.pruned).flatten(-2)
    return ~lowest(scores, round(pattern.fraction * scores.shape[-1]))


def lowest(scores: Float[Tensor, "*groups size"], count: int) -> Bool[Tensor, "*groups size"]:
    """True at exactly `count` entries of each row: the lowest, and of equal ones the earliest."""
    if count in (0, scores.shape[-1]):
        return torch.full_like(scores, bool(count), dtype=torch.bool)
    threshold = _kth_lowest(scores, count)
    chosen = scores <= threshold
    if int(chosen.count_nonzero()) * scores.shape[-1] == scores.numel() * count:
        return chosen
    below, tied = scores < threshold, scores == threshold
    places_left = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1) <= places_left))


def lowest_of_few(scores: Float[Tensor, "size groups"], count: int) -> Bool[Tensor, "size groups"]:
    """`lowest` of each column, by comparing every entry with every other: nothing for a GPU to wait for."""
    place = torch.arange(len(scores), device=scores.device)
    earlier = (place[:, None] < place)[:, :, None]
    first = (scores[:, None] < scores) | ((scores[:, None] == scores) & earlier)  # [which, than which, groups]
    return first.sum(dim=0) < count


def check_sweep(
    weight: Float[Tensor, "d_out d_in"], pattern: Pattern, blocksize: int, keep: Bool[Tensor, "..."] | None
) -> None:
    """The pattern fits the layer and its blocks, or the mask given in its place does; or an error."""
    check_blocksize(blocksize)
    if keep is None:
        pattern.check(weight.shape[1], blocksize)
    else:
        check_keep(weight, keep)


def realised_sparsity(weight: Float[Tensor, "..."]) -> float:
    """Fraction of entries that are exactly zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else math.nan


def groups_beyond(weight: Shaped[Tensor, "d_out d_in"], pattern: NM) -> int:
    """How many groups of M consecutive entries of a row hold more than N that are not zero.

    Raises:
        ValueError: M does not divide d_in.
    """
    pattern.check(weight.shape[1], pattern.group)
    kept = (weight != 0).unflatten(1, (-1, pattern.group)).sum(dim=2, dtype=torch.int32)
    return int((kept > pattern.kept).sum())


def _kth_lowest(scores: Float[Tensor, "*groups size"], k: int) -> Float[Tensor, "*groups 1"]:
    """The k-th lowest entry of each row, k from 1: an exact value, found in the way that is quickest for the shape."""
    if scores.shape[-1] <= _FEW:
        return _kth_of_few(list(scores.unbind(-1)), k).unsqueeze(-1)
    if scores.device.type != "cpu":
        single = scores.numel() == scores.shape[-1]  # kthvalue gives a row to a single processor of a GPU
        return scores.sort().values[..., k - 1 : k] if single else scores.kthvalue(k, dim=-1, keepdim=True).values
    rows = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    kth = _kth_of_many(rows.reshape(-1), k) if scores.numel() == scores.shape[-1] else None
    found = np.partition(rows, k - 1)[..., k - 1 : k] if kth is None else np.full((*rows.shape[:-1], 1), kth)
    return torch.from_numpy(found).to(scores.dtype)


def _kth_of_few(entries: list[Float[Tensor, "*groups"]], k: int) -> Float[Tensor, "*groups"]:
    """By whole tensors of first, second, … entries, which for groups of four is far quicker than a sort of each."""
    for _ in range(k - 1):  # take the lowest away
        least, rest = entries[0], []
        for entry in entries[1:]:
            rest.append(torch.maximum(least, entry))
            least = torch.minimum(least, entry)
        entries = rest
    return reduce(torch.minimum, entries)


def _kth_of_many(scores: Float[np.ndarray, " size"], k: int) -> np.floating[Any] | None:
    """A sorted sample says between which two values the k-th lowest must lie; only what lies there is looked at.

    None where the scores are few, or the sample misleads, as it may when they follow a pattern.
    """
    if len(scores) < 4 * _SAMPLE:
        return None
    sample = np.sort(scores[:: len(scores) // _SAMPLE])
    # Two roots of the sample's size are at least four standard deviations of the k-th lowest's place in it.
    centre, slack = k * len(sample) // len(scores), 2 * math.isqrt(len(sample))
    low, high = sample[max(centre - slack, 0)], sample[min(centre + slack, len(sample) - 1)]
    within = scores[(scores >= low) & (scores <= high)]
    rank = k - np.count_nonzero(scores < low)
    return np.partition(within, rank - 1)[rank - 1] if 0 < rank <= len(within) else None
