"""Models whose weights accelerate has put where there was room."""

import hashlib
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import offload_state_dict
from conftest import tiny_llama, tiny_opt
from transformers import AutoModelForCausalLM

from sparselab import Wanda, collect, perplexity, prune
from sparselab.analysis import LayerStudy
from sparselab.errors import OutputError, UnsupportedModelError
from sparselab.experiment import Workbench
from sparselab.models.blocks import Decoder, write_weight

PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
          "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def mapped(saved, **how):
    """As `device_map="auto"` does where there is less memory than model."""
    return AutoModelForCausalLM.from_pretrained(
        saved, device_map=PLACES, offload_folder=saved.parent / "offloaded", **how
    )


def in_main_memory(_):
    model = tiny_llama()
    cpu_offload(model, torch.device("cpu"))
    return model


def on_disk(saved):
    model = tiny_llama()
    disk_offload(model, saved.parent / "all", torch.device("cpu"))
    return model


def in_both(saved):
    """Copies of weights in main memory, as for a GPU that is too small."""
    model, folder = tiny_llama(), saved.parent / "both"
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    offload_state_dict(folder, {name: weight for name, weight in weights.items() if "layers.1." in name})
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    places = PLACES | {"model.layers.0": "disk"}
    dispatch_model(model, places, main_device="cpu", state_dict=kept, offload_dir=folder, force_hooks=True)
    loader = model.model.layers[0].mlp.up_proj._hf_hook.weights_map.dataset
    assert loader.state_dict
    assert loader.index
    return model


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("place", [mapped, in_main_memory, on_disk, in_both])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_pruned_where_its_blocks_live_with_the_same_bits(saved, tokens, place, propagate):
    before = digests(saved)
    model, whole = place(saved), tiny_llama()
    absent = {name for name, weight in model.named_parameters() if weight.is_meta}
    assert absent
    report = prune(model, tokens, sparsity="2:4", propagate=propagate, progress=False)
    expected = prune(whole, tokens, sparsity="2:4", propagate=propagate, progress=False)
    assert report.layers.drop(columns="seconds").equals(expected.layers.drop(columns="seconds"))
    assert absent == {name for name, weight in model.named_parameters() if weight.is_meta}, "put back where they were"
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    decoder, blocks = Decoder(model), Decoder(whole).blocks
    for index, expected in enumerate(blocks):
        with decoder.block(index) as block:
            assert all(torch.equal(block.state_dict()[name], weight) for name, weight in expected.state_dict().items())
    assert digests(saved) == before, "the checkpoint that it came from is as it was"


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_saved_by_its_own_method(saved, tokens, tmp_path):
    model, whole = mapped(saved), tiny_llama()
    prune(model, tokens, progress=False)
    prune(whole, tokens, progress=False)
    model.save_pretrained(tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(pruned[name], weight) for name, weight in whole.state_dict().items())


def test_measured_as_if_it_were_whole(saved, tokens):
    model, whole = mapped(saved), tiny_llama()
    assert Decoder(model).device == torch.device("cpu")
    assert torch.equal(perplexity(model, tokens, progress=False).nll, perplexity(whole, tokens, progress=False).nll)
    expected = collect(whole, tokens, progress=False)
    for name, seen in collect(model, tokens, progress=False).items():
        assert torch.equal(seen.hessian, expected[name].hessian)
    assert not list((saved.parent / "offloaded").glob("*.dat")), "looking writes nothing"


def test_tied_half_precision(tokens, tmp_path):
    def tied():
        return tiny_opt(tie_word_embeddings=True).to(torch.bfloat16)

    model, whole = tied(), tied()
    disk_offload(model, tmp_path / "disk", torch.device("cpu"))
    Wanda(model).prune(tokens, 0.5, progress=False)
    Wanda(whole).prune(tokens, 0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_a_failure_leaves_the_block_as_it_was(saved, tokens):
    model = mapped(saved)
    decoder = Decoder(model)
    with pytest.raises(KeyboardInterrupt), decoder.block(1, write_back=True) as block:
        write_weight(block.mlp.up_proj, torch.zeros(48, 32))
        raise KeyboardInterrupt
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)


def test_no_room_for_pruned_weights_is_found_out_first(saved, tokens, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=PLACES)
    with pytest.raises(ValueError, match=r"expected a folder for pruned weights .* pass offload_folder"):
        prune(model, tokens, progress=False)
    model = mapped(saved)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 10}))
    with pytest.raises(OutputError, match="found 0 MB free; make room or write elsewhere"):
        prune(model, tokens, progress=False)
    assert not list(Path(saved.parent / "offloaded").glob("*.dat"))


def test_an_offload_folder_belongs_to_one_model(saved, tokens):
    prune(mapped(saved), tokens, progress=False)
    with pytest.raises(ValueError, match="expected an offload_folder of its own"):
        prune(mapped(saved), tokens, "wanda", progress=False)


def test_what_needs_all_weights_at_once_says_so(saved, tokenizer):
    model = mapped(saved)
    for study in (Workbench, LayerStudy):
        with pytest.raises(UnsupportedModelError, match="expected a model whose weights are all in memory"):
            study(model, tokenizer)
