import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselab.errors import NonFiniteError
from sparselab.solvers import NM, Unstructured, keep_largest, parse_sparsity, pattern_from_counts, realised_sparsity


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (0.5, Unstructured(0.5)), (0, Unstructured(0.0)), (1, Unstructured(1.0)), ("0.5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)), (" 62.5 % ", Unstructured(0.625)), ("2:4", NM(2, 4)), ("1:4", NM(1, 4)),
        (NM(4, 8), NM(4, 8)), ("1e-1", Unstructured(0.1)),
    ],
)  # fmt: skip
def test_parse(text, pattern):
    assert parse_sparsity(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "half", "5:4", "2:0", -0.1, 1.1, math.nan, "150%", "nan", True, None, "1e", "2:4:8"]
)
@pytest.mark.usefixtures("untyped")
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"expected"):
        parse_sparsity(text)


@pytest.mark.parametrize("text", ["50%", "62.5%", "2:4", "0%", "100%"])
def test_patterns_print_as_they_are_written(text):
    assert str(parse_sparsity(text)) == text
    assert parse_sparsity(str(parse_sparsity(text))) == parse_sparsity(text)


def test_n_m_counts_the_kept_and_prunen_the_pruned():
    assert NM(1, 4).fraction == 0.75
    assert pattern_from_counts(0.5, 3, 4) == NM(1, 4)
    assert pattern_from_counts(0.5, 2, 4) == NM(2, 4)
    assert pattern_from_counts(0.3, 0, 0) == Unstructured(0.3)
    for wrong in [(1, 0), (0, 4), (5, 4), (-1, 4)]:
        with pytest.raises(ValueError, match="prunem"):
            pattern_from_counts(0.5, *wrong)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_any_library(number):
    assert parse_sparsity(number) == Unstructured(0.5)
    assert pattern_from_counts(number, 0, 0) == Unstructured(0.5)
    assert parse_sparsity(np.int64(1)) == Unstructured(1.0)
    assert NM(np.int64(2), np.int64(4)) == NM(2, 4)


@pytest.mark.usefixtures("untyped")
def test_huge_and_manifold_numbers_are_refused_in_words():
    for wrong in (10**400, "9" * 5000 + ":4", "9" * 5000, np.inf):
        with pytest.raises(ValueError, match="sparsity: expected a fraction") as refusal:
            parse_sparsity(wrong)
        assert len(str(refusal.value)) < 200
    for wrong in (np.ones(2), torch.ones(2)):
        with pytest.raises(TypeError, match="sparsity: expected a number, received"):
            parse_sparsity(wrong)


@pytest.mark.usefixtures("untyped")
def test_counts_are_whole_numbers():
    for wrong in ((2.0, 4), (2, 4.0), ("2", 4), (None, 4), (True, 4)):
        with pytest.raises(TypeError, match="expected a whole number"):
            pattern_from_counts(0.5, *wrong)
        with pytest.raises(TypeError, match="expected a whole number"):
            NM(*wrong)


@pytest.mark.usefixtures("untyped")
def test_keep_largest_reads_patterns_and_refuses_nan():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    for sparsity in ("2:4", "50%", 0.5):
        assert keep_largest(scores, sparsity).tolist() == [[True, False, True, False]]
    scores[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="scores have NaN"):
        keep_largest(scores, 0.5)
    with pytest.raises(TypeError, match="scores: expected a tensor, received list"):
        keep_largest([1.0, 2.0], 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 10_000), (3, 1000), (50, 40, 4)])
def test_a_gpu_chooses_what_the_cpu_does(shape):
    scores = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0)).float()
    for sparsity in (0.0, 1 / shape[-1], 0.3, 0.5, 1.0):
        assert torch.equal(keep_largest(scores.cuda(), sparsity).cpu(), keep_largest(scores, sparsity))


def in_order(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda k: (scores[k], k))[:count])


@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=4), st.floats(0, 1))
def test_exact_count_in_every_group_and_earliest_of_equals_first(rows, fraction):
    scores = torch.tensor(rows, dtype=torch.float32)
    keep = keep_largest(scores, Unstructured(fraction))
    for row, kept in zip(rows, keep.tolist(), strict=True):
        assert {k for k in range(12) if not kept[k]} == in_order(row, round(fraction * 12))


@given(
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
    st.sampled_from([(0, 4), (1, 4), (2, 4), (4, 4), (2, 3), (5, 6)]),
)
def test_n_m_keeps_exactly_n_of_every_m(row, counts):
    kept, group = counts
    keep = keep_largest(torch.tensor([row], dtype=torch.float32), NM(kept, group))[0].tolist()
    for start in range(0, 12, group):
        pruned = {k for k in range(group) if not keep[start + k]}
        assert pruned == in_order(row[start : start + group], group - kept)


def test_m_must_divide():
    with pytest.raises(ValueError, match=r"2:4: M must divide d_in, received d_in 6"):
        keep_largest(torch.ones(3, 6), NM(2, 4))


def test_realised_sparsity_counts_zeros_of_either_sign():
    assert realised_sparsity(torch.tensor([0.0, -0.0, 1.0, 2.0])) == 0.5
    assert math.isnan(realised_sparsity(torch.empty(0)))


@pytest.mark.parametrize("share", [1e-5, 0.3, 0.5, 0.999])
@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), id="random"),
        pytest.param(torch.arange(100_000.0), id="sorted"),
        pytest.param(torch.arange(100_000.0).fmod(12), id="ties, and a pattern that a sample in steps of 12 misses"),
        pytest.param(torch.zeros(100_000), id="all equal"),
        pytest.param(torch.rand(100_000, dtype=torch.float64).bfloat16(), id="bfloat16"),
    ],
)
def test_a_large_group_is_cut_exactly(scores, share):
    count = round(share * len(scores))
    pruned = ~keep_largest(scores, share)
    order = scores.float().sort(stable=True).indices
    assert torch.equal(pruned.nonzero()[:, 0], order[:count].sort().values)
