import math

import pytest
import torch
from conftest import tiny_llama

from sparselab import solvers
from sparselab.calibration import collect
from sparselab.gradual import cubic, prune_gradually
from sparselab.models.blocks import Decoder, read_weight
from sparselab.pruning import prune
from sparselab.solvers import Unstructured

SCHEDULE = ("30%", 0.5, "60%", "70%")
QUIET = {"progress": False}
METHODS = ("magnitude", "wanda", "sparsegpt")


def weights(model):
    return {name: read_weight(linear).clone() for name, linear in Decoder(model).linears().items()}


def assert_equal(first, second):
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def groups(weight, method, blocksize):
    """What competes for survival, one group a row of each part."""
    if method == "sparsegpt":
        return [part.flatten()[None] for part in weight.split(blocksize, dim=1)]
    return [weight if method == "wanda" else weight.flatten()[None]]


@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_a_pruning_of_the_model_as_it_is(family, tokens, method):
    model, by_hand = family(), family()
    reports = prune_gradually(model, tokens, SCHEDULE, method, blocksize=16, **QUIET)
    assert [str(report.settings.pattern) for report in reports] == ["30%", "50%", "60%", "70%"]
    for sparsity, report in zip(SCHEDULE, reports, strict=True):
        expected = prune(by_hand, tokens, method, sparsity, blocksize=16, **QUIET)
        assert list(report.layers.relative_error) == list(expected.layers.relative_error)
    assert_equal(weights(model), weights(by_hand))


def test_statistics_are_those_of_the_pruned_model(llama, tokens):
    before = tiny_llama()
    stale = collect(before, tokens, **QUIET)
    prune(before, tokens, "wanda", "50%", propagate="dense", **QUIET)
    fresh = collect(before, tokens, **QUIET)
    prune_gradually(llama, tokens, ("50%", "75%"), "wanda", propagate="dense", **QUIET)
    differ = 0
    for name, weight in weights(llama).items():
        start = read_weight(before.get_submodule(name))
        assert torch.equal(weight, solvers.wanda(start, fresh[name].feature_norm, "75%"))
        differ += not torch.equal(weight, solvers.wanda(start, stale[name].feature_norm, "75%"))
    assert differ > 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [SCHEDULE, ("3:4", "2:4", "1:4"), ("2:4", "60%")])
def test_every_step_has_exactly_the_sparsity_asked_for(family, tokens, method, schedule):
    for steps in range(1, len(schedule) + 1):
        model = family()
        prune_gradually(model, tokens, schedule[:steps], method, blocksize=16, **QUIET)
        pattern = solvers.parse_sparsity(schedule[steps - 1])
        for weight in weights(model).values():
            if isinstance(pattern, Unstructured):
                for part in groups(weight, method, 16):
                    assert ((part == 0).sum(dim=1) == round(pattern.fraction * part.shape[1])).all()
            else:
                assert ((weight.unflatten(1, (-1, 4)) == 0).sum(dim=2) == pattern.pruned).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ("3:4", "2:4", "60%")])
def test_what_is_pruned_stays_pruned(family, tokens, method, schedule):
    model, gone = family(), {}
    for sparsity in schedule:  # a schedule of one step is a step: see the first test
        prune_gradually(model, tokens, [sparsity], method, **QUIET)
        for name, weight in weights(model).items():
            assert (weight[gone.get(name, weight == 0)] == 0).all()
            gone[name] = weight == 0


def test_gradual_magnitude_is_magnitude(family):
    model, at_once = family(), family()
    prune_gradually(model, None, SCHEDULE, "magnitude", **QUIET)
    prune(at_once, None, "magnitude", "70%", **QUIET)
    assert_equal(weights(model), weights(at_once))


def test_a_zero_that_compensation_fills_may_come_back_in_sparsegpt():
    """Two inputs that are nearly the same: what the first weight did falls to the second, which was zero."""
    weight = torch.tensor([[1.0, 0.0], [10.0, 0.1]])
    hessian = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    again = solvers.sparsegpt(weight, hessian, 0.5, blocksize=1)
    assert (again == 0).tolist() == [[True, False], [False, True]]


def test_the_same_windows_serve_all_steps(tokens):
    model, other = tiny_llama(), tiny_llama()
    prune_gradually(model, (row for row in tokens), ("40%", "60%"), **QUIET)
    prune_gradually(other, tokens, ("40%", "60%"), **QUIET)
    assert_equal(weights(model), weights(other))


def test_progress_is_told_of_all_steps_as_one(llama, tokens):
    told = []
    prune_gradually(llama, tokens, ("40%", "60%"), "wanda", progress=lambda *units: told.append(units))
    assert told == [(n, 42) for n in range(1, 43)]


def test_the_cubic_schedule():
    assert [pattern.fraction for pattern in cubic("80%", 4)] == pytest.approx([0.4625, 0.7, 0.7875, 0.8])
    assert [str(pattern) for pattern in cubic(0.7, 2)] == ["61.25%", "70%"]
    assert cubic("70%", 1) == [Unstructured(0.7)]
    assert all(math.isclose(cubic(s, 8)[-1].fraction, s) for s in (0.1, 0.33, 1.0))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((), "schedule: expected at least one step"),
        (("50%", "50%"), "expected each step above the one before, received 50% after 50%"),
        (("50%", 0.4), "received 40% after 50%"),
        (("50%", "2:4"), "received 2:4 after 50%"),
        (("40%", "2:4"), "received it after 40%, which leaves groups with more than 2 zeros"),
        (("4:8", "1:4"), "expected 1:4 as the first step or after N:M of the same M, received it after 4:8"),
        (("50%", "170%"), "sparsity: expected a fraction from 0 to 1"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_bad_schedule_changes_nothing(llama, tokens, schedule, message):
    before = weights(llama)
    with pytest.raises(ValueError, match=message):
        prune_gradually(llama, tokens, schedule, **QUIET)
    assert_equal(weights(llama), before)


@pytest.mark.usefixtures("untyped")
def test_other_arguments_that_will_not_do(llama, tokens):
    before = weights(llama)
    with pytest.raises(ValueError, match="calib: expected windows, since every step collects anew"):
        prune_gradually(llama, collect(llama, tokens, **QUIET), ("40%", "60%"), **QUIET)
    with pytest.raises(ValueError, match="percdamp: expected a finite number"):
        prune_gradually(llama, tokens, ("40%", "60%"), percdamp=-1.0, **QUIET)
    with pytest.raises(TypeError, match="unexpected keyword argument 'perccdamp'"):
        prune_gradually(llama, tokens, ("40%", "60%"), perccdamp=0.1, **QUIET)
    for sparsity in ("2:4", 0.0):
        with pytest.raises(ValueError, match="sparsity: expected a fraction above 0"):
            cubic(sparsity, 4)
    with pytest.raises(ValueError, match="steps: expected at least 1, received 0"):
        cubic("70%", 0)
    assert_equal(weights(llama), before)
