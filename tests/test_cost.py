import math

import pandas as pd
import pytest
import torch

from sparselab import cost, solvers
from sparselab.calibration import collect
from sparselab.solvers import InputStatistics

CPU = torch.device("cpu")
SHAPE = (48, 32)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d_in", [1, 7, 128])
def test_statistics_take_the_bytes_of_the_formula_and_of_a_filled_object(d_in):
    assert cost.statistics_bytes(d_in, True) == 4 * d_in**2
    assert cost.statistics_bytes(d_in, False) == 4 * d_in
    for full in (True, False):
        filled = InputStatistics(d_in, full)
        filled.update(torch.ones(3, d_in))
        assert (filled.hessian if full else filled.feature_norm).nbytes == cost.statistics_bytes(d_in, full)


def test_statistics_of_published_models():
    table = cost.statistics_table(cost.PUBLISHED).set_index("model")
    assert list(table.index) == list(cost.PUBLISHED)
    llama = table.loc["LLaMA-7B"]
    assert llama.hessian_widest == 4 * 11008**2
    assert llama.hessians_block == 4 * (3 * 4096**2 + 11008**2)
    assert llama.norms_block == 4 * (3 * 4096 + 11008)
    assert llama.hessians_model == 32 * llama.hessians_block


def test_a_block_of_a_real_model_holds_what_the_table_counts(llama, tokens):
    table = cost.statistics_table({"llama": (32, 48, 3)})
    for blocks, column in (([0], "hessians_block"), (None, "hessians_model")):
        seen = {id(each): each for each in collect(llama, tokens, progress=False, blocks=blocks).values()}
        assert sum(each.hessian.nbytes for each in seen.values()) == table[column].item()


def test_medians_are_of_the_timed_rounds_in_turn(monkeypatch):
    log, now = [], iter([0.0, 9, 0, 9] + [0, 1, 0, 10] * 2 + [0, 2, 0, 20] + [0, 4, 0, 40] * 2)
    monkeypatch.setattr(cost, "_clock", lambda device: next(now))
    timed = cost.interleaved({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, repeats=5)
    assert log == ["a", "b"] * 6, "in turn, and once to warm up"
    assert timed == {"a": (2, 1, 4), "b": (20, 10, 40)}
    with pytest.raises(ValueError, match="expected at least 5, received 4"):
        cost.interleaved({}, repeats=4)


def test_product_times_have_a_row_for_each_and_restore_the_threads():
    before = torch.get_num_threads()
    times = cost.product_times(SHAPE, (1, 8), (0.0, 0.5, 0.9), draws(), repeats=5)
    assert list(times) == ["tokens", "sparsity", "form", "seconds", "fastest", "slowest"]
    assert len(times) == len(times.drop_duplicates(["tokens", "sparsity", "form"])) == 2 * 3 * 2
    assert (times.fastest > 0).all()
    assert (times.fastest <= times.seconds).all()
    assert (times.seconds <= times.slowest).all()
    assert torch.get_num_threads() == before


def test_one_thread_inside_and_as_before_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="inside"):
            with cost.one_thread():
                assert torch.get_num_threads() == 1
                raise RuntimeError("inside")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_both_forms_compute_the_same_product():
    weight = solvers.magnitude(torch.randn(SHAPE, generator=draws()), 0.7)
    inputs = torch.randn(5, SHAPE[1], generator=draws(1))
    sparse = cost.csr_tensor(weight)
    assert sparse.layout == torch.sparse_csr
    assert len(sparse.values()) == int(weight.count_nonzero()) < weight.numel()
    torch.testing.assert_close((sparse @ inputs.T).T, inputs @ weight.T)


@pytest.mark.parametrize(
    ("csr", "expected"),
    [((9, 2, 0.5), 0.9), ((9, 0.5, 0.4), 0.5), ((0.5, 2, 0.5), 0.9), ((0.5, 0.5, 0.5), 0.0), ((0.1, 0.1, 2), math.nan)],
)
def test_break_even_is_where_csr_wins_from_there_on(csr, expected):
    rows = [(1, s, "CSR", t) for s, t in zip((0.0, 0.5, 0.9), csr, strict=True)]
    rows += [(1, s, "dense", 1.0) for s in (0.9, 0.0, 0.5)] + [
        (8, s, f, 1.0) for s in (0.0, 0.5) for f in ("CSR", "dense")
    ]
    times = pd.DataFrame(rows, columns=["tokens", "sparsity", "form", "seconds"])
    assert cost.break_even(times, 1) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(cost.break_even(times, 8))


def test_two_of_four_products_are_refused_with_the_reason(monkeypatch):
    assert "need an NVIDIA GPU of compute capability 8.0 or newer; this device is 'cpu'" in cost.lacks_semi_structured(
        CPU
    )
    with pytest.raises(ValueError, match="this device is 'cpu'; leave this measurement out"):
        cost.semi_structured_times((64, 64), (64,), draws(), CPU)
    for capability, reason in (((7, 5), "this GPU has 7.5"), ((8, 0), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        found = cost.lacks_semi_structured(torch.device("cuda"))
        assert found.endswith(reason)
        assert bool(found) == bool(reason)


@pytest.mark.gpu
def test_two_of_four_products_are_timed_on_a_gpu():
    device = torch.device("cuda")
    if reason := cost.lacks_semi_structured(device):
        pytest.skip(reason)
    times = cost.semi_structured_times((256, 256), (64,), draws(), device, repeats=5)
    assert list(times.form) == ["dense", "2:4"]
    assert (times.fastest > 0).all()
