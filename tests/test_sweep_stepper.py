import numpy as np
import pytest
import torch
from layers import layer

import sparselab
from sparselab import solvers
from sparselab.models.blocks import Decoder, read_weight
from sparselab.widgets.sweep_stepper import Slice, State, SweepStepper, slice_of, trace_sweep, view


@pytest.fixture
def layer_slice() -> Slice:
    W, _, H = layer(5, 12)
    return Slice(W, H, "a model; a layer")


@pytest.fixture
def stepper(layer_slice) -> SweepStepper:
    return SweepStepper(layer_slice, State(step=3), blocksize=4)


def weights(view):
    """What the panel of the weights shows."""
    ax = next(ax for ax in view.figure.axes if ax.get_title(loc="left").startswith("3."))
    return ax.get_title(loc="left"), np.asarray(ax.images[0].get_array())


def test_the_view_shows_the_step_of_the_trace(layer_slice):
    trace = trace_sweep(layer_slice, "50%", 0.01, blocksize=4)
    for q in (0, 5, 11):
        shown = view(trace, State(step=q))
        title, drawn = weights(shown)
        assert title == f"3. Weights after column {q}"
        np.testing.assert_array_equal(drawn, trace.steps[q].weight.numpy())
        gone = (~trace.steps[q].keep[:, q]).tolist()
        assert (shown.numbers.pruned == "×").tolist() == gone
        assert (shown.numbers["error²"] != "").tolist() == gone
        assert f"Column {q} of 12: {sum(gone)} of 5 weights pruned" in shown.summary
        assert f"{trace.errors['sweep'][q]:.2%} of" in shown.summary
        assert shown.figure.get_supxlabel() == "a model; a layer; 50% (realised 50.00%), percdamp 0.01"
    before = [f"{value:.4f}" for value in trace.steps[4].weight[:, 5].tolist()]
    assert view(trace, State(step=5)).numbers["weight before"].tolist() == before


def test_errors_of_the_trace_are_those_of_the_solvers(layer_slice):
    trace = trace_sweep(layer_slice, "2:4", 0.1)
    W, H = layer_slice.weight, solvers.damped(layer_slice.hessian, 0.1)
    last = trace.errors.iloc[-1]
    pruned = solvers.sparsegpt(W, layer_slice.hessian, "2:4", 0.1)
    assert last.sweep == pytest.approx(solvers.relative_error(W, pruned, H))
    best = solvers.reconstruct(W, H, trace.steps[-1].keep)
    assert last.optimum == pytest.approx(solvers.relative_error(W, best, H))
    assert (trace.errors.sweep.diff().dropna() >= -1e-12).all()
    assert (trace.errors.optimum <= trace.errors.sweep + 1e-12).all()


@pytest.mark.parametrize("step", [-1, 12])
def test_no_such_step(layer_slice, step):
    with pytest.raises(ValueError, match=f"step: expected 0 to 11, received {step}"):
        view(trace_sweep(layer_slice, "50%", 0.01), State(step))


def test_controls_redraw(stepper):
    pictures = [stepper.picture.value]
    for control, value in ((stepper.step, 4), (stepper.sparsity, "2:4"), (stepper.percdamp, 1.0)):
        control.value = value
        pictures.append(stepper.picture.value)
    assert len(set(pictures)) == 4
    assert stepper.state == State(4, "2:4", 1.0)
    assert "Column 4 of 12" in stepper.status.value
    assert stepper.step.continuous_update is False


def test_a_new_sparsity_or_percdamp_is_a_new_sweep_and_a_step_is_not(stepper):
    first = stepper.trace
    stepper.forward.click()
    assert stepper.trace is first
    stepper.sparsity.value = "1:4"
    assert solvers.realised_sparsity(stepper.trace.steps[-1].weight) == 0.75
    stepper.percdamp.value = 0.1
    assert (stepper.trace.sparsity, stepper.trace.percdamp) == ("1:4", 0.1)
    assert not torch.equal(stepper.trace.hessian, first.hessian)


def test_buttons_step_and_stop_at_both_ends(stepper):
    stepper.forward.click()
    assert stepper.step.value == 4
    stepper.back.click()
    assert stepper.step.value == 3
    for button, end in ((stepper.back, 0), (stepper.forward, 11)):
        stepper.step.value = end
        picture = stepper.picture.value
        button.click()
        assert stepper.step.value == end
        assert stepper.picture.value == picture
        assert "⚠" not in stepper.status.value


def test_an_error_becomes_the_status_line_and_passes(stepper):
    picture = stepper.picture.value
    stepper.sparsity.options = [*stepper.sparsity.options, ("5:8", "5:8")]
    stepper.sparsity.value = "5:8"
    assert "⚠ pattern 5:8: M must divide d_in, received d_in 12" in stepper.status.value
    assert stepper.picture.value == picture
    stepper.sparsity.value = "2:4"
    assert "⚠" not in stepper.status.value
    assert stepper.picture.value != picture


def test_a_singular_hessian_is_explained():
    W, X, _ = layer(3, 8)
    X[:, 1] = X[:, 0]  # two inputs that are always the same
    stepper = SweepStepper(Slice(W, X.T @ X - 1e-9 * torch.eye(8), ""), State(percdamp=0.0))
    assert "not positive definite with percdamp 0" in stepper.status.value
    stepper.percdamp.value = 0.01
    assert "Column 0 of 8" in stepper.status.value


def test_a_first_state_outside_the_lists_is_kept(layer_slice):
    stepper = SweepStepper(layer_slice, State(2, "3:6", 0.03), blocksize=6)
    assert stepper.state == State(2, "3:6", 0.03)
    assert "Column 2 of 12" in stepper.status.value


def test_a_slice_is_a_part_of_its_layer(llama, tokens):
    statistics = sparselab.collect(llama, tokens, progress=False)
    decoder = Decoder(llama)
    rows, inputs = range(2, 7), range(4, 12)
    cut = slice_of(llama, statistics, "1.self_attn.q*_proj", rows, inputs, "small")
    name = f"{decoder.blocks_name}.1.self_attn.q_proj"
    W, H = read_weight(decoder.linears()[name]).detach().double(), statistics[name].hessian.double()
    assert torch.equal(cut.weight, W[2:7, 4:12])
    assert torch.equal(cut.hessian, H[4:12, 4:12])
    assert cut.caption == f"small; rows 2–6 × inputs 4–11 of {name}"
    whole = W.clone()
    whole[2:7, 4:12] = 0
    zero = torch.zeros_like(cut.weight)
    assert solvers.layer_error(W, whole, H) == pytest.approx(solvers.layer_error(cut.weight, zero, cut.hessian))


@pytest.mark.parametrize("name", ["9.self_attn.q_proj", "q_proj"])
def test_no_layer_or_several_of_that_name(llama, tokens, name):
    with pytest.raises(ValueError, match=f"self_attn.q_proj, .*received '{name}'"):
        slice_of(llama, sparselab.collect(llama, tokens, progress=False), name, range(2), range(2), "")
