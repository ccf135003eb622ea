"""Problem set 3, a small study: what is wrong with an interval, a table or an allocation.

Each check takes the student's function (the last one a file) and returns a line to show once all is well. Other seeds
try other numbers. Tables are tried as copies, and have to stay as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparselab.course.allocation import allocate, costs
from sparselab.course.answers import Answer, CheckError
from sparselab.course.handed_in import results
from sparselab.course.tiny import prepare
from sparselab.course.values import kind, normal
from sparselab.uncertainty import Interval, interval95, t95

__all__ = ["allocate", "best_settings", "costs", "interval", "paired_difference", "prepare", "results"]

_RTOL = 1e-3  # of means and half widths: t with three decimals will do
_CLEAR = 0.02  # no drawn interval ends so close to zero, in half widths, that rounding could decide
_PERCDAMPS, _NSAMPLES = (0.001, 0.01, 0.1, 1.0), (4, 16, 64)


def interval(function: Callable[..., Any], seed: int = 0) -> str:
    """`interval(values)`: mean and half width of the 95% interval of Student's t.

    Raises:
        CheckError: other numbers, with a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for count in (3, 2, 5, 10):
        values = (2.7 + 0.2 * normal(draw, count)).double()
        expected = interval95(values)
        mean, half = expected.mean, expected.half_width
        sd, root = float(values.std()), math.sqrt(count)
        halves = {
            "the variance is divided by n − 1, not by n": half * math.sqrt((count - 1) / count),
            "1.96 is for very many values; take t with n − 1 degrees of freedom": 1.96 * sd / root,
            "t has n − 1 degrees of freedom": t95(count) * sd / root,
            "a mean varies less than its values: divide by √n": t95(count - 1) * sd,
            "that is the standard error: times t": sd / root,
            "that is the standard deviation": sd,
            "that is the variance": sd**2,
            "half the width is asked for": 2 * half,
        }
        guesses = {guess: Interval(mean, other) for guess, other in halves.items()}
        guesses["mean and half width, not the two ends"] = Interval(expected.low, expected.high)
        _compare(answer, f"{count} values", answer(values.tolist()), expected, guesses)
    return f"{answer.name}: mean and half width, for two values and for ten."


def paired_difference(function: Callable[..., Any], seed: int = 0) -> str:
    """`paired_difference(table, a, b)`: log perplexity of b minus that of a, seed by seed; mean and half width.

    Raises:
        CheckError: other numbers, with a guess at the reason; a table that was changed.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for case, alone in (("all seeds in both", 0), ("seeds that only one method has", 2)):
        common = torch.randperm(20, generator=draw)[:5]
        level, noise = 0.3 * normal(draw, 5), 0.01 * normal(draw, 2, 5)
        logs = 2.7 + level + noise + torch.tensor([[0.0], [0.05]])
        a = dict(zip(common.tolist(), logs[0].tolist(), strict=True)) | {20 + i: 3.5 + i for i in range(alone)}
        b = dict(zip(common.tolist(), logs[1].tolist(), strict=True)) | {30 + i: 2.0 - i / 2 for i in range(alone)}
        runs = {
            "wanda": a,
            "sparsegpt": dict(reversed(b.items())),
            "magnitude": {s: 4 + v for s, v in list(a.items())[1:]},
        }
        rows = [(name, s, math.exp(value)) for name, found in runs.items() for s, value in found.items()]
        table = pd.DataFrame(rows, columns=["method", "seed", "perplexity"])
        table = table.loc[torch.randperm(len(table), generator=draw).tolist()] if alone else table
        got = _asked(answer, table, "wanda", "sparsegpt")
        _compare(answer, case, got, interval95(_paired(a, b)), _wrong_pairs(a, b, table))
    return f"{answer.name}: pairs by seed, logarithms, b minus a."


def best_settings(function: Callable[..., Any], seed: int = 0) -> str:
    """`best_settings(table)`: for each nsamples all percdamps that cannot be told from the best, by paired intervals.

    Raises:
        CheckError: not such lists, or others, with a guess at the reason; a table that was changed.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for _ in range(3):
        logs, expected, guesses = _drawn_study(draw)
        rows = [
            (_PERCDAMPS[p], _NSAMPLES[n], s, math.exp(value))
            for n, of_n in enumerate(logs.tolist())
            for p, of_p in enumerate(of_n)
            for s, value in enumerate(of_p)
        ]
        table = pd.DataFrame(rows, columns=["percdamp", "nsamples", "seed", "perplexity"])
        table = table.loc[torch.randperm(len(table), generator=draw).tolist()]
        got = _as_lists(answer, _asked(answer, table))
        reason = next((f": {guess}" for guess, lists in guesses.items() if got == lists), "")
        for n, percdamps in expected.items():
            if got[n] != percdamps:
                order = ": sort them" if sorted(got[n]) == percdamps else reason
                raise CheckError(f"{answer.name} at nsamples {n} gives {got[n]}, expected {percdamps}{order}")
    return f"{answer.name}: whatever the seeds cannot tell from the best, for each nsamples."


def _asked(answer: Answer, table: pd.DataFrame, *more: Any) -> Any:
    given = table.copy()
    result = answer(given, *more)
    if not given.equals(table):
        raise CheckError(f"{answer.name} changes the table that it is given; work on a copy: table = table.copy()")
    return result


def _compare(answer: Answer, case: str, given: Any, expected: Interval, guesses: Mapping[str, Interval]) -> None:
    try:
        mean, half = (float(number) for number in given)
    except (TypeError, ValueError):
        raise CheckError(f"{answer.name} returns {kind(given)}, expected two numbers: mean and half width") from None
    got = Interval(mean, half)
    if not _close(got, expected):
        reason = next((f": {guess}" for guess, value in guesses.items() if _close(got, value)), "")
        raise CheckError(f"{answer.name}, {case}: {_said(got)}, expected {_said(expected)}{reason}")


def _said(interval: Interval) -> str:
    return f"{interval.mean:.4g} ± {interval.half_width:.4g}"


def _close(given: Interval, expected: Interval) -> bool:
    pairs = ((given.mean, expected.mean), (given.half_width, expected.half_width))
    return all(math.isclose(*pair, rel_tol=_RTOL, abs_tol=1e-9) for pair in pairs)


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> Tensor:
    return torch.tensor([b[seed] - a[seed] for seed in a if seed in b], dtype=torch.float64)


def _wrong_pairs(a: Mapping[int, float], b: Mapping[int, float], table: pd.DataFrame) -> dict[str, Interval]:
    found = interval95(_paired(a, b))
    both = [seed for seed in a if seed in b]
    values = [torch.tensor([of[seed] for seed in both], dtype=torch.float64) for of in (a, b)]
    every = [torch.tensor(list(of.values()), dtype=torch.float64) for of in (a, b)]
    rows = [torch.tensor(table.perplexity[table.method == name].tolist()).double() for name in ("wanda", "sparsegpt")]
    t, n = t95(len(both) - 1), len(both)
    apart = math.sqrt(sum(float(value.var()) for value in values) / n)
    return {
        "b minus a, not a minus b": Interval(-found.mean, found.half_width),
        "take the logarithms first": interval95(values[1].exp() - values[0].exp()),
        "that is a ratio; take its logarithm": interval95((values[1] - values[0]).exp()),
        "rows are not in the order of seeds; match them by seed": interval95(rows[1].log() - rows[0].log()),
        "the seeds' common part is still in it: take differences first, then their spread": Interval(
            found.mean, t * apart
        ),
        "the seeds' common part is still in it; differences first": Interval(found.mean, t95(2 * n - 2) * apart),
        "half widths of the two do not add up; take differences first": Interval(
            found.mean, sum(interval95(value).half_width for value in values)
        ),
        "seeds that only one of them has cannot be paired": Interval(
            float(every[1].mean() - every[0].mean()), found.half_width
        ),
    }


def _drawn_study(draw: torch.Generator) -> tuple[Tensor, dict[int, list[float]], dict[str, dict[int, list[float]]]]:
    """Log perplexities [nsamples, percdamps, seeds] on which no usual mistake goes unnoticed and nothing is close."""
    place, level = torch.arange(4.0), torch.tensor([0.3, 0.1, 0.0])
    while True:
        best = torch.tensor([2.5, 1.6, 0.6]) + 0.3 * normal(draw, 3)
        effect = level[:, None] + 0.01 * (place - best[:, None]) ** 2
        logs = (2.7 + effect[:, :, None] + 0.2 * normal(draw, 3, 1, 4) + 0.008 * normal(draw, 3, 4, 4)).double()
        expected = _listed(_undecided(logs))
        guesses = _wrong_lists(logs)
        same_best = bool((logs.mean(-1).argmin(1) == logs.exp().mean(-1).argmin(1)).all())
        if same_best and _is_clear(logs) and all(lists != expected for lists in guesses.values()):
            return logs, expected, guesses


def _undecided(logs: Tensor, t: float | None = None, best: int | None = None) -> list[list[bool]]:
    """Which percdamps have a paired interval of the difference to the best that contains zero."""
    found = []
    for of_n in logs:
        reference = of_n[int(of_n.mean(1).argmin()) if best is None else best]
        intervals = [interval95(of_p - reference) for of_p in of_n]
        scale = 1.0 if t is None else t / t95(logs.shape[-1] - 1)
        found.append([abs(each.mean) <= scale * each.half_width for each in intervals])
    return found


def _is_clear(logs: Tensor) -> bool:
    for of_n in logs:
        intervals = [interval95(of_p - of_n[int(of_n.mean(1).argmin())]) for of_p in of_n]
        halves = [(abs(each.mean), each.half_width) for each in intervals]
        if any(abs(mean - half) < _CLEAR * half for mean, half in halves if half):
            return False
    return True


def _wrong_lists(logs: Tensor) -> dict[str, dict[int, list[float]]]:
    seeds, lowest = logs.shape[-1], logs.mean(-1)
    halves = t95(seeds - 1) * logs.std(-1) / math.sqrt(seeds)
    ends = (lowest - halves <= (lowest + halves).gather(1, lowest.argmin(1, keepdim=True))).tolist()
    only = (lowest == lowest.min(1, keepdim=True).values).tolist()
    first = (logs[..., 0] == logs[..., 0].min(1, keepdim=True).values).tolist()
    everywhere = _undecided(logs, best=int(lowest.mean(0).argmin()))
    wrong = {
        "the lowest mean alone; which others can it not be told from?": only,
        "that is the best of one seed": first,
        "intervals that overlap say little; take the interval of the paired difference": ends,
        "the best is looked for in each nsamples by itself": everywhere,
        "t with n − 1 degrees of freedom, not 1.96": _undecided(logs, t=1.96),
    }
    return {guess: _listed(chosen) for guess, chosen in wrong.items()}


def _listed(chosen: Sequence[Sequence[bool]]) -> dict[int, list[float]]:
    return {
        n: [percdamp for percdamp, is_in in zip(_PERCDAMPS, of_n, strict=True) if is_in]
        for n, of_n in zip(_NSAMPLES, chosen, strict=True)
    }


def _as_lists(answer: Answer, given: Any) -> dict[int, list[float]]:
    if not isinstance(given, Mapping) or set(given) != set(_NSAMPLES):
        raise CheckError(f"{answer.name} returns {kind(given)}, expected a dict with keys {list(_NSAMPLES)}")
    try:
        return {n: [float(percdamp) for percdamp in given[n]] for n in _NSAMPLES}
    except (TypeError, ValueError):
        raise CheckError(
            f"{answer.name} returns {kind(given)}, expected a list of percdamps for each nsamples"
        ) from None
