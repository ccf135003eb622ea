import json

import pytest
import torch
from conftest import tiny_llama
from families import MIXTURES, tiny
from safetensors.torch import load_file, save_file

from sparselab import check_saved, prune
from sparselab.errors import ModelLoadError, OutputError
from sparselab.models import checkpoint


@pytest.fixture
def saved(tmp_path):
    """A pruned model, and the folder that it was saved to."""
    model = tiny_llama()
    prune(model, method="magnitude", sparsity="2:4", progress=False)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder, name, change):
    """Change a tensor in the file."""
    path = folder / checkpoint.SINGLE
    held = load_file(path)
    held[name] = change(held[name].clone())
    save_file(held, path, metadata={"format": "pt"})


def zero_filled(weight):
    weight[weight == 0] = 1e-8
    return weight


def other_bit(weight):
    weight.view(torch.int32).view(-1)[weight.abs().argmax()] ^= 1
    return weight


@pytest.mark.parametrize("family", ["gpt2", "gemma2", *MIXTURES])
def test_what_was_saved_is_found_again_without_a_tokenizer(tmp_path, family):
    model = tiny(family).bfloat16()
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)


def test_gradients_dropout_and_device_maps_do_not_matter(saved):
    model, folder = saved
    check_saved(model.train(), folder)
    assert model.training


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", zero_filled, "768 of 1536 values are others, 768 of them zero in one"),
        ("model.layers.2.self_attn.q_proj.weight", other_bit, "1 of 1024 values are others, 0 of them zero in one"),
        ("model.embed_tokens.weight", other_bit, "1 of 9600 values are others"),
        ("model.norm.weight", lambda weight: weight + 1, "32 of 32 values are others"),
    ],
)
def test_one_other_value_is_named(saved, name, change, message):
    model, folder = saved
    rewrite(folder, name, change)
    with pytest.raises(OutputError, match=f"{name} is not that of the model: {message}"):
        check_saved(model, folder)


def test_a_configuration_that_says_something_else(saved):
    model, folder = saved
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-2}))
    with pytest.raises(OutputError, match=r"has the weights that were written and gives other logits"):
        check_saved(model, folder)
    (folder / "config.json").write_text(json.dumps(said | {"dtype": "bfloat16"}))
    with pytest.raises(OutputError, match=r"expected \(32, 32\) of float32, received \(32, 32\) of bfloat16"):
        check_saved(model, folder)


def test_another_model(saved, tmp_path):
    with pytest.raises(OutputError, match=r"model.layers.3.*is in the model or in the folder, and not in both"):
        check_saved(tiny_llama(num_hidden_layers=4), saved[1])
    with pytest.raises(ModelLoadError, match=r"expected a model folder with a config.json, found none"):
        check_saved(saved[0], tmp_path.parent)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.tensor([1.0, -0.0, 2.0]), "1 of 3 values are others, 0 of them zero"),
        (torch.tensor([1.0, 0.0, float("nan")]), "1 of 3 values are others"),
        (torch.tensor([1.0, 0.0, 0.0]), "1 of 3 values are others, 1 of them zero"),
        (torch.tensor([1.0, 0.0, 2.0, 0.0]), r"expected (3,) of float32, received (4,) of float32"),
        (torch.tensor([1.0, 0.0, 2.0]).half(), r"received (3,) of float16"),
        (torch.tensor([1.0, 0.0, 2.0]), ""),
    ],
)
def test_bits_are_compared(found, words):
    said = checkpoint.unlike(torch.tensor([1.0, 0.0, 2.0]), found)
    assert words in said
    assert bool(said) == bool(words)
    nan = torch.tensor(float("nan"))
    assert checkpoint.unlike(nan, nan.clone()) == "", "the same bits, though no equal numbers"
