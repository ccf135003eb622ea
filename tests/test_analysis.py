import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

import sparselab
from sparselab import solvers
from sparselab.analysis import (
    LayerStudy,
    Question,
    ask_all,
    effective_boundary,
    error_by_output,
    mask_agreement,
    spectrum,
)
from sparselab.errors import SingularHessianError
from sparselab.experiment import TextConfig
from sparselab.models.blocks import Decoder, read_weight

UP = "model.layers.1.mlp.up_proj"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_agreement_is_intersection_over_union(pairs):
    first, second = (torch.tensor([[pair[side] for pair in pairs]]) for side in (0, 1))
    both, either = sum(a and b for a, b in pairs), sum(a or b for a, b in pairs)
    assert mask_agreement(first, second) == (both / either if either else 1.0)


def test_random_masks_agree_as_stated():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(400, 400, generator=generator) > 0.6 for _ in range(2)]
    assert mask_agreement(*masks) == pytest.approx(0.4 / 1.6, abs=0.01)


def test_errors_by_output_are_those_of_single_rows_and_sum_to_the_layers():
    W, X, H = layer(5, 12)
    P = solvers.magnitude(W, 0.5)
    parts = error_by_output(W, P, H)
    torch.testing.assert_close(parts, (X @ (W - P).T).square().sum(dim=0))
    assert float(parts.sum()) == pytest.approx(solvers.layer_error(W, P, H))


def test_boundary_is_flat_for_magnitude_and_falls_with_the_norm_for_wanda():
    W = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    norm = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    flat = effective_boundary(W, solvers.magnitude(W, 0.5) != 0)
    assert flat.std() < 0.02
    by_wanda = effective_boundary(W, solvers.wanda(W.T.contiguous(), torch.ones(4000), 0.5).T != 0)
    assert by_wanda.std() < 0.1, "equal norms cut alike"
    falling = effective_boundary(W, solvers.magnitude(W * norm, 0.5) != 0)
    torch.testing.assert_close(falling * norm, torch.full((6,), float((falling * norm).mean())), rtol=0.05, atol=0)
    keep = torch.ones(4000, 6, dtype=torch.bool)
    keep[:, 2] = False
    boundary = effective_boundary(W, keep)
    assert boundary[2] == W[:, 2].abs().max()
    assert (boundary[[0, 1, 3, 4, 5]] == 0).all()


def test_spectrum_is_the_squared_singular_values():
    _, X, H = layer(1, 10, tokens=6)
    values = spectrum(H.float())
    torch.testing.assert_close(values[:6], torch.linalg.svdvals(X)[:6] ** 2, rtol=1e-4, atol=1e-4)
    assert (values >= 0).all()
    assert (values[6:] < 1e-3).all()


@pytest.fixture
def study(llama, tokenizer):
    text = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=5)
    return LayerStudy(llama, tokenizer, "random llama", text, sizes=(6, 2), progress=False)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_answers_are_the_solvers_and_errors_those_of_the_tokens_named(study, llama, tokenizer, method):
    answer = study.ask(Question(UP, method, "2:4", nsamples=2))
    weight = read_weight(llama.get_submodule(UP))
    calib = sparselab.calibration_tokens(tokenizer, TEXTS, 6, 16)[:2]
    held_out = sparselab.evaluation_tokens(tokenizer, TEXTS[:20], 5, 16)
    H, H_out = (sparselab.collect(llama, tokens, progress=False)[UP].hessian for tokens in (calib, held_out))
    expected = {
        "magnitude": lambda: solvers.magnitude(weight, "2:4"),
        "wanda": lambda: solvers.wanda(weight, H.diagonal().sqrt(), "2:4"),
        "sparsegpt": lambda: solvers.sparsegpt(weight, H, "2:4"),
    }[method]()
    torch.testing.assert_close(answer.pruned, expected, rtol=1e-3, atol=1e-4)
    assert answer.calibration_error == pytest.approx(solvers.relative_error(weight, expected, H), rel=1e-3)
    assert answer.heldout_error == pytest.approx(solvers.relative_error(weight, expected, H_out), rel=1e-3)
    assert torch.equal(answer.keep, answer.pruned != 0)


def test_questions_are_answered_once(study):
    question = Question(UP, nsamples=6)
    assert study.ask(question) is study.ask(replace(question))
    assert study.spectrum(UP, 6) is study.spectrum(UP, 6)


def test_what_cannot_be_asked(study):
    assert len(study.layers) == 21
    with pytest.raises(ValueError, match=r"layer: expected one of 21 such as model\.layers\.0.*received 'up_proj'"):
        study.ask(Question("up_proj", nsamples=6))
    with pytest.raises(ValueError, match=r"nsamples: expected one of \[2, 6\], received 3"):
        study.ask(Question(UP, nsamples=3))
    with pytest.raises(ValueError, match="method: expected one of"):
        study.ask(Question(UP, "obc", nsamples=6))


def test_a_table_of_answers_marks_failures(study, monkeypatch):
    questions = [Question(UP, "wanda", nsamples=2), Question(UP, "sparsegpt", percdamp=1e-6, nsamples=2)]
    ask = study.ask

    def failing(question):
        if question.method == "sparsegpt":
            raise SingularHessianError("not positive definite")
        return ask(question)

    monkeypatch.setattr(study, "ask", failing)
    table = ask_all([study, study], questions, progress=False)
    assert list(table.method) == 2 * ["wanda", "sparsegpt"]
    assert list(table.failure) == 2 * ["", "not positive definite"]
    assert table.heldout_error[0] == ask(questions[0]).heldout_error
    assert table.heldout_error.isna().tolist() == 2 * [False, True]
    assert set(table.columns) >= {"pattern", "percdamp", "nsamples", "seed", "calibration_error"}


def test_only_some_blocks_are_held(llama, tokenizer):
    text = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=2)
    study = LayerStudy(llama, tokenizer, text=text, sizes=(1,), blocks=[2], progress=False)
    assert study.layers == [name for name in Decoder(llama).linears() if ".2." in name]


def test_a_layer_without_outputs_has_no_relative_error(study, llama):
    with torch.no_grad():
        llama.get_submodule(UP).weight.zero_()
    assert math.isnan(study.ask(Question(UP, "magnitude", nsamples=6)).calibration_error)
