import json
import os
import time

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

import sparselab
from sparselab import load, prune_checkpoint, stream
from sparselab.errors import ModelLoadError
from sparselab.models.loading import tiny_folder


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_folder_in_and_out(folder, tokens):
    model, tokenizer = sparselab.load(folder, device="cpu")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("def f")["input_ids"][0] == tokenizer.bos_token_id
    assert not model.training
    assert sparselab.load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_the_bundled_model(bundled, capfd):
    model, tokenizer, *_ = bundled
    assert model.dtype == torch.float32
    assert 4e6 < model.num_parameters() < 8e6
    assert sum(file.stat().st_size for file in tiny_folder().iterdir()) < 16e6
    assert load_file(tiny_folder() / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    text = "import os\n\n\ndef main(λ):\n\treturn os.getcwd()\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    sparselab.load("tiny")
    assert capfd.readouterr() == ("", "")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_a_weight(folder):
    kept = load_file(folder / "model.safetensors")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def drop(folder, pattern):
    for file in folder.glob(pattern):
        file.unlink()


DAMAGES = {
    "empty folder": lambda folder: drop(folder, "*"),
    "no config": lambda folder: drop(folder, "config.json"),
    "config not json": lambda folder: (folder / "config.json").write_text("{"),
    "unknown architecture": lambda folder: edit_config(folder, model_type="abacus"),
    "weights of another shape": lambda folder: edit_config(folder, intermediate_size=64),
    "no weights": lambda folder: drop(folder, "*.safetensors"),
    "truncated weights": truncate_weights,
    "a weight missing": drop_a_weight,
    "no tokenizer": lambda folder: drop(folder, "token*"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_named(folder, damage):
    damage(folder)
    with pytest.raises(ModelLoadError) as caught:
        sparselab.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nothing():
    with pytest.raises(ModelLoadError, match=r"no/such-model: expected 'tiny', a model folder or a hub id"):
        sparselab.load("no/such-model")


def test_weights_that_the_configuration_has_no_place_for_are_named(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelLoadError, match=r"place.*, first model\.layers\.2\."):
        sparselab.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: drop(folder, "token*"), "has no tokenizer files; save the model's tokenizer there too"),
        (lambda folder: edit_config(folder, intermediate_size=64), r"shape \(32, 48\) in its files and of \(32, 64\)"),
        (lambda folder: tiny_llama().model.save_pretrained(folder), r"no weights for the head \(lm_head\.weight\)"),
        (truncate_weights, "fetch or save it again"),
        (drop_a_weight, r"lack 1 weights, first model\.layers\.1\.mlp\.up_proj\.weight; fetch it again"),
    ],
)  # fmt: skip
def test_damages_come_with_a_remedy(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelLoadError, match=message):
        sparselab.load(folder)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", 3, torch.device("meta")])
def test_devices_that_are_not_here(folder, device):
    with pytest.raises(ValueError, match=r"device: expected one of cpu.* on this machine, received "):
        sparselab.load(folder, device)


def test_a_name_that_is_nothing_is_quick_and_quiet_without_a_network(monkeypatch, capfd):
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sparselab.models.loading.get_session", lambda: asked.append(1) or unreachable())
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", unreachable)
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match=r"no/such-model: expected 'tiny', .*check the name, and the network"):
        sparselab.load("no/such-model")
    assert time.monotonic() - started < 5
    assert asked == [1]
    assert capfd.readouterr() == ("", "")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(folder, monkeypatch, tmp_path):
    """A model that brings its own Python code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
    return folder


@pytest.mark.parametrize("opens", [load, stream])
def test_code_that_comes_with_a_model_is_not_run_unless_it_is_trusted(own_code, tokens, opens):
    with pytest.raises(ModelLoadError, match="brings Python code of its own; look at it, and if you trust it, pass"):
        opens(own_code, "cpu")
    with pytest.warns(UserWarning, match="Python code that comes with this model is run, with all your rights"):
        model, tokenizer = opens(own_code, "cpu", trust_remote_code=True)
    if opens is load:
        assert type(model).__name__ == "OwnForCausalLM"
        return
    prune_checkpoint(model, tokenizer, tokens, own_code.parent / "out", progress=False)
    with pytest.warns(UserWarning, match="is run"):
        pruned, _ = load(own_code.parent / "out", "cpu", trust_remote_code=True)
    assert type(pruned).__name__ == "OwnForCausalLM"
