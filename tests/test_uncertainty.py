import math
from statistics import fmean, variance

import pytest
import torch

from sparselab import Perplexity, difference
from sparselab.uncertainty import Interval, interval95, pooled, t95

# 97.5% quantiles of Student's distribution by degrees of freedom, from a printed table.
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 5: 2.57058, 9: 2.26216, 19: 2.09302, 63: 1.99834, 399: 1.96593}


def losses(*windows: float, seqlen: int = 8) -> Perplexity:
    return Perplexity(torch.tensor(windows, dtype=torch.float64), seqlen)


def drawn(seeds: int, windows: int, seed: int = 0) -> list[Perplexity]:
    generator = torch.Generator().manual_seed(seed)
    return [Perplexity(2 + torch.randn(windows, generator=generator, dtype=torch.float64), 8) for _ in range(seeds)]


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_student_s_quantiles_are_those_of_tables(freedom, quantile):
    assert t95(freedom) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize("freedom", [10**5, 10**9])
def test_with_very_many_values_student_s_is_the_normal_distribution(freedom):
    assert t95(freedom) == pytest.approx(1.95996, rel=2e-5)


def test_interval_of_a_mean_by_hand():
    found = interval95(torch.tensor([1.0, 2.0, 6.0]))
    assert found.mean == 3
    assert found.half_width == pytest.approx(TABLE[2] * math.sqrt(7 / 3), rel=1e-5)
    assert (found.low, found.high) == (3 - found.half_width, 3 + found.half_width)
    alone = interval95(torch.tensor([5.0]))
    assert (alone.mean, math.isnan(alone.half_width), alone.distinguishable) == (5, True, False)
    with pytest.raises(ValueError, match="values: expected at least one, received none"):
        interval95(torch.tensor([]))


@pytest.mark.parametrize(
    ("mean", "half_width", "text", "in_words"),
    [
        (-0.0962, 0.0036, "−0.0962 ± 0.0036", None),
        (0.13572, 0.0521, "0.136 ± 0.052", None),
        (-0.00001, 0.5, "0.00 ± 0.50", "not distinguishable"),
        (1234.4, 56.0, "1234 ± 56", None),
        (0.5, 0.5, "0.50 ± 0.50", "not distinguishable"),
        (0.25, 0.0, "0.2500 ± 0.0000", None),
        (0.0, 0.0, "0.0000 ± 0.0000", "not distinguishable"),
        (-0.25, math.nan, "−0.2500 ± nan", "not distinguishable"),
    ],
)
def test_how_an_interval_is_written(mean, half_width, text, in_words):
    interval = Interval(mean, half_width)
    assert str(interval) == text
    assert interval.in_words == (in_words or text)
    assert interval.distinguishable == (in_words is None)


def by_the_book(first: list[Perplexity], second: list[Perplexity]) -> tuple[float, float]:
    """Mean and half width, number by number."""
    table = [[float(a.nll[w] - b.nll[w]) for w in range(len(a.nll))] for a, b in zip(first, second, strict=True)]
    over_seeds = [fmean(row[w] for row in table) for w in range(len(table[0]))]
    over_windows = [fmean(row) for row in table]
    halves = [TABLE[len(over_seeds) - 1] * math.sqrt(variance(over_seeds) / len(over_seeds))]
    if len(table) > 1:
        halves.append(TABLE[len(table) - 1] * math.sqrt(variance(over_windows) / len(table)))
    return fmean(over_windows), math.sqrt(sum(half**2 for half in halves))


@pytest.mark.parametrize(("seeds", "windows"), [(1, 6), (1, 400), (2, 3), (3, 64), (10, 2)])
def test_difference_number_by_number(seeds, windows):
    first, second = drawn(seeds, windows, 1), drawn(seeds, windows, 2)
    found = difference(first, second)
    assert (found.mean, found.half_width) == pytest.approx(by_the_book(first, second), rel=1e-5)
    assert found.mean == pytest.approx(math.log(pooled(first)[0] / pooled(second)[0]))
    back = difference(second, first)
    assert (back.mean, back.half_width) == pytest.approx((-found.mean, found.half_width))
    if seeds == 1:
        assert difference(first[0], second[0]) == found == difference(first, second[0])


def test_pairing_takes_out_what_windows_have_in_common():
    [first] = drawn(1, 400)
    small = 0.01 * torch.randn(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = difference(Perplexity(first.nll + 0.002 + small, 8), first)
    assert found.distinguishable
    assert found.half_width < 0.02 * float(first.nll.std()) / math.sqrt(400) * 1.96 * 1.5
    assert difference(first, first) == Interval(0, 0)


def test_seeds_that_do_not_matter_change_nothing():
    [first], [second] = drawn(1, 30, 1), drawn(1, 30, 2)
    assert difference([first] * 3, [second] * 3).half_width == pytest.approx(difference(first, second).half_width)


def test_one_window_leaves_the_width_unknown():
    for seeds in (1, 2):
        found = difference(drawn(seeds, 1, 1), drawn(seeds, 1, 2))
        assert math.isfinite(found.mean)
        assert math.isnan(found.half_width)


def covered(seeds: int, windows: int, by_seed: float, draws: int, of_first_seed: bool = False) -> float:
    """How often the interval holds the true difference, of losses whose windows, seeds and both together vary."""
    generator, truth = torch.Generator().manual_seed(seeds), 0.1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hits = 0
    for _ in range(draws):
        table = truth + normal(1, windows) + by_seed * normal(seeds, 1) + 0.3 * normal(seeds, windows)
        level = 3 + normal(1, windows)  # which both models find hard or easy alike
        pairs = [(Perplexity(level[0] + row, 8), Perplexity(level[0], 8)) for row in table]
        first, second = zip(*pairs[:1] if of_first_seed else pairs, strict=True)
        hits += abs(difference(first, second).mean - truth) <= difference(first, second).half_width
    return hits / draws


DRAWS = 600
CHANCE = 4 * math.sqrt(0.95 * 0.05 / DRAWS)  # four standard errors of a share of 95%: 0.036


@pytest.mark.parametrize("windows", [5, 40])
def test_one_seed_covers_95_percent_of_what_windows_do(windows):
    assert covered(1, windows, by_seed=0, draws=DRAWS) == pytest.approx(0.95, abs=CHANCE)


@pytest.mark.parametrize(("seeds", "by_seed"), [(2, 0.5), (3, 0.2), (3, 2.0), (5, 0.0), (5, 0.2)])
def test_several_seeds_cover_at_least_95_percent(seeds, by_seed):
    share = covered(seeds, 40, by_seed, DRAWS)
    assert share > 0.95 - CHANCE
    assert share < 1, "an interval that is never wrong says nothing"


def test_one_seed_knows_nothing_of_the_others():
    assert covered(3, 40, 0.5, DRAWS, of_first_seed=True) < 0.95 - 2 * CHANCE


def test_pooled_perplexity():
    [one] = drawn(1, 20)
    assert pooled([one]) == (float(one), one.stderr)
    several = drawn(3, 20)
    value, stderr = pooled(several)
    means = [float(each.nll.mean()) for each in several]
    assert value == pytest.approx(math.exp(fmean(means)))
    windows = [fmean(float(each.nll[w]) for each in several) for w in range(20)]
    assert stderr == pytest.approx(value * math.sqrt(variance(windows) / 20 + variance(means) / 3))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (losses(1, 2), losses(1, 2, 3), ValueError, "the same windows, received 2 windows of 8 tokens and 3 of 8"),
        (losses(1, 2), losses(1, 2, seqlen=9), ValueError, "received 2 windows of 8 tokens and 2 of 9"),
        ([losses(1, 2), losses(1)], [losses(1, 2)] * 2, ValueError, "received 2 windows of 8 tokens and 1 of 8"),
        (
            [losses(1, 2)] * 2,
            losses(1, 2),
            ValueError,
            "second: expected one perplexity for each of the first's 2, rec",
        ),
        ([], losses(1, 2), ValueError, "first: expected at least one perplexity, received none"),
        (12.5, losses(1, 2), TypeError, "first: expected what perplexity gives, or one for each seed, received float"),
        (losses(1, 2), [12.5], TypeError, "second: expected what perplexity gives, or one for each seed"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, error, message):
    with pytest.raises(error, match=message):
        difference(first, second)
