import base64

import numpy as np
import pytest
from conftest import TEXTS

from sparselab.analysis import LayerStudy, Question
from sparselab.experiment import TextConfig
from sparselab.widgets.layer_lab import LayerLab, State, view

START = State(1, "mlp.up_proj", "wanda", "60%", 0.01, 6)


@pytest.fixture
def study(llama, tokenizer):
    text = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=5)
    return LayerStudy(llama, tokenizer, "random llama", text, sizes=(2, 6), progress=False)


def test_the_view_shows_the_answers(study):
    shown = view(study, START)
    answer = study.ask(Question("model.layers.1.mlp.up_proj", "wanda", "60%", nsamples=6))
    assert f"{answer.heldout_error:.4f} on held-out" in shown.summary
    numbers = shown.numbers.set_index("method")
    assert list(numbers.index) == ["magnitude", "wanda", "sparsegpt"]
    assert numbers.loc["wanda", "error, held-out"] == f"{answer.heldout_error:.5f}"
    assert numbers.loc["sparsegpt", "mask agreement with SparseGPT"] == "1.000"
    mask = next(ax for ax in shown.figure.axes if ax.images and ax.get_ylabel().startswith("output"))
    assert np.array_equal(mask.images[0].get_array(), answer.keep.numpy()[:64, :64])
    caption = shown.figure.get_supxlabel()
    for words in ("model.layers.1.mlp.up_proj", "realised 59.", "random llama", "6 × 16 tokens", "seed 0"):
        assert words in caption


def test_every_panel_is_drawn(study):
    titles = [ax.get_title() for ax in view(study, START).figure.axes]
    for words in ("wanda: kept", "relative layer error", "error sits", "method cuts", "condition number", "IoU"):
        assert any(words in title for title in titles), words


def test_every_control_changes_the_picture(study):
    lab = LayerLab(study, START)
    changes = [
        ("block", 0), ("projection", "self_attn.q_proj"), ("method", "sparsegpt"), ("pattern", "2:4"),
        ("nsamples", 2), ("percdamp", 10.0), ("pattern", "fraction"), ("sparsity", 0.3),
    ]  # fmt: skip
    for name, value in changes:
        before = bytes(lab.picture.value), lab.status.value
        getattr(lab, name).value = value
        assert (bytes(lab.picture.value), lab.status.value) != before, name
        assert bytes(lab.picture.value).startswith(b"\x89PNG")
    assert lab.state == State(0, "self_attn.q_proj", "sparsegpt", "30%", 10.0, 2)


def test_the_sparsity_slider_rests_while_a_pattern_is_chosen(study):
    lab = LayerLab(study, State(0, "mlp.up_proj", sparsity="2:4", nsamples=6))
    assert lab.sparsity.disabled
    assert lab.state.sparsity == "2:4"
    lab.pattern.value = "fraction"
    assert not lab.sparsity.disabled
    assert lab.state.sparsity == "50%"


def test_an_error_is_a_line_and_the_last_picture_stays(study, monkeypatch):
    lab = LayerLab(study, START)
    before = bytes(lab.picture.value)

    def fail(*args):
        raise ValueError("the <layer>\nis out of order")

    monkeypatch.setattr("sparselab.widgets.layer_lab.view", fail)
    lab.sparsity.value = 0.2
    assert "⚠ the &lt;layer&gt; is out of order" in lab.status.value
    assert lab.picture.value == before


def test_saved_in_a_notebook_it_carries_its_picture(study):
    lab = LayerLab(study, START)
    bundle = lab._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == lab.picture.value
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_first_layer_is_shown_unless_told_otherwise(study):
    assert LayerLab(study).state == State(0, "self_attn.q_proj", nsamples=6)
