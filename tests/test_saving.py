"""A folder that is not what was to be saved is found out, whatever is wrong with it."""

import json

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from sparselab import prune, saving, stream
from sparselab.errors import ModelLoadError, OutputError, UnsupportedModelError
from sparselab.models import checkpoint
from sparselab.saving import check_saved
from sparselab.streaming import prune_checkpoint

QUIET = {"progress": False}


@pytest.fixture
def model(tokens):
    model = tiny("llama")
    prune(model, tokens, "magnitude", "50%", **QUIET)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def changed(folder, change):
    """Write the file of weights anew, changed."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "opt-projected", "gpt2", "mixtral", "gpt_oss"])
def test_what_was_saved_whole_passes_and_is_not_changed(family, tokens, tmp_path):
    model = tiny(family)
    prune(model, tokens, "magnitude", "2:4", **QUIET)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    check_saved(model, tmp_path, tokens)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_half_precision_passes(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    check_saved(model, tmp_path)


def test_other_weights_are_found(model, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda weights: weights[name].masked_fill_(weights[name] == 0, 1e-4))
    zeros = int((model.state_dict()[name] == 0).sum())
    with pytest.raises(OutputError, match=rf"{name}: expected the weights of .* others \({zeros} zeros elsewhere\)"):
        check_saved(model, folder)


def test_weights_of_another_shape_are_found(model, folder):
    configured(folder, intermediate_size=47)
    with pytest.raises(OutputError, match="opened again, it has mismatched weights"):
        check_saved(model, folder)


def test_a_missing_weight_is_found(model, folder):
    changed(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(OutputError, match=r"opened again, it has missing weights, first model\.norm\.weight"):
        check_saved(model, folder)


def test_a_configuration_that_computes_something_else_is_found(model, folder):
    configured(folder, rms_norm_eps=0.1)
    with pytest.raises(OutputError, match="expected to give the same logits, received some that differ by up to"):
        check_saved(model, folder)


@pytest.mark.usefixtures("untyped")
def test_no_model_and_none_in_memory(model, folder, tokenizer, tmp_path):
    with pytest.raises(ModelLoadError, match=r"expected model\.safetensors"):
        check_saved(model, tmp_path)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="expected a model whose weights are all in memory"):
        check_saved(stream(folder, "cpu")[0], folder)


def test_a_file_that_is_read_back_otherwise_stops_the_run(folder, tokenizer, tokens, tmp_path, monkeypatch):
    tokenizer.save_pretrained(folder)

    def fumbled(tensors, path, metadata):
        largest = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | {largest: tensors[largest].flatten().flip(0).view_as(tensors[largest])}, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", fumbled)
    with pytest.raises(OutputError, match=r"model-00001-of-.*safetensors: .* was read back with other bits"):
        prune_checkpoint(stream(folder, "cpu")[0], tokenizer, tokens, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_an_output_that_opens_as_another_model_takes_no_place(folder, tokenizer, tokens, tmp_path, monkeypatch):
    tokenizer.save_pretrained(folder)
    reopened = saving.open_again

    def opened(model, folder, device):
        configured(folder, rms_norm_eps=0.1)
        return reopened(model, folder, device)

    monkeypatch.setattr("sparselab.streaming.open_again", opened)
    with pytest.raises(OutputError, match=f"{tmp_path / 'out'}: opened again, .* the same logits"):
        prune_checkpoint(stream(folder, "cpu")[0], tokenizer, tokens, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
