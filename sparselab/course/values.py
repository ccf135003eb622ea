"""What an answer gives back: is it of the right kind, and is it right; and random numbers to try it on."""

from typing import Any

import torch
from torch import Tensor

from sparselab.course.answers import Answer, CheckError

# Largest difference, relative to the largest number expected; the rounding of float32 takes less than a tenth of it.
TOLERANCE = 1e-3
Slips = dict[str, Tensor]  # what usual mistakes give, by the words for them


def kind(value: Any) -> str:
    """A value in a few words: a tensor by its dtype and shape, anything else by how it is written."""
    return f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"


def as_mask(answer: Answer, value: Any, like: Tensor) -> Tensor:
    """The value, if it is a boolean tensor of that shape.

    Raises:
        CheckError: it is something else.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != like.shape:
        raise CheckError(
            f"{answer.name} returns {kind(value)}, expected a boolean tensor {list(like.shape)}: True = keep"
        )
    return value


def as_matrix(answer: Answer, value: Any, like: Tensor) -> Tensor:
    """The value in float64, if it is a finite tensor of numbers of that shape.

    Raises:
        CheckError: it is something else, or has NaN or infinite entries.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != like.shape:
        raise CheckError(f"{answer.name} returns {kind(value)}, expected a tensor of numbers {list(like.shape)}")
    if not value.isfinite().all():
        raise CheckError(f"{answer.name} returns NaN or infinite numbers: is something divided by zero?")
    return value.double()


def check_group(name: str, place: str, scores: Tensor, keep: Tensor, pruned: int) -> None:
    """Of one comparison group exactly so many go, and none that is larger than one that stays.

    Raises:
        CheckError: another number goes, or not the smallest scores.
    """
    kept, expected = int(keep.sum()), scores.numel() - pruned
    if kept != expected:
        tied = (
            " Ties? Of equal scores only as many may go as are needed."
            if scores.unique().numel() < len(scores.flatten())
            else ""
        )
        raise CheckError(f"{name}: {place} keeps {kept} of {scores.numel()}, expected {expected}.{tied}")
    if kept and pruned and scores[~keep].max() > scores[keep].min():
        raise CheckError(
            f"{name}: {place} prunes a score of {scores[~keep].max():.3g} and keeps one of {scores[keep].min():.3g}; "
            "the smallest have to go"
        )


def agree(place: str, got: Tensor, expected: Tensor, slips: Slips | None = None, blocksize: int = 0) -> None:
    """The numbers are those expected, within the tolerance.

    Raises:
        CheckError: they are not: where the first wrong one is, and perhaps why.
    """
    if _close(got, expected):
        return
    wrong = ((got - expected).abs() > TOLERANCE * expected.abs().max()).nonzero()
    at = min((tuple(each) for each in wrong.tolist()), key=lambda each: each[::-1])  # in the first wrong column
    reason = guess(got, slips or {})
    if not reason and blocksize and at[-1] and at[-1] % blocksize == 0:
        reason = " (a block begins in the first wrong column: does what earlier blocks lost reach it, and once?)"
    raise CheckError(f"{place}: entry {list(at)} is {got[at]:.4g}, expected {expected[at]:.4g}{reason}")


def guess(got: Tensor, slips: Slips) -> str:
    """In brackets, the mistake that gives these numbers, or most nearly so; nothing if none does."""
    near = [(float((got - slip).abs().max()), reason) for reason, slip in slips.items() if _close(got, slip)]
    return f" ({min(near)[1]})" if near else ""


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=draw)


def tied(draw: torch.Generator, *shape: int) -> Tensor:
    """Few different values, so that many are equal."""
    return torch.randint(-2, 3, shape, generator=draw).float()


def _close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())
