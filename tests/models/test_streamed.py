import json

import pytest
import torch
from conftest import tiny_llama, tiny_opt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import sparselab
from sparselab.errors import ModelLoadError
from sparselab.models import Decoder
from sparselab.models.checkpoint import SINGLE, Checkpoint
from sparselab.models.streamed import StreamedModel

CPU = torch.device("cpu")


def streamed(folder, **how):
    return StreamedModel(Checkpoint(folder), CPU, **how)


def test_weights_come_and_go(tmp_path, family):
    whole = family()
    whole.save_pretrained(tmp_path)
    model = streamed(tmp_path)
    decoder = Decoder(model)
    absent = {name: weight.device.type for name, weight in model.model.state_dict().items()}
    assert set(absent.values()) == {"meta"}
    with decoder.block(1) as block:
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, whole.state_dict()[decoder.block_prefix(1) + name])
        assert next(decoder.blocks[0].parameters()).is_meta
    with decoder.outside():
        here = {name for name, weight in model.model.state_dict().items() if not weight.is_meta}
        assert here == {name for name in absent if decoder.is_outside(name)}
    with decoder.outside(head=False):
        head = model.model.get_output_embeddings().weight
        assert head.is_meta == (head is not model.model.get_input_embeddings().weight)
    assert {name: weight.device.type for name, weight in model.model.state_dict().items()} == absent


def test_it_computes_what_the_whole_model_does(tmp_path, family, tokens):
    whole = family()
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = sparselab.perplexity(whole, tokens, progress=False)
    assert torch.equal(sparselab.perplexity(streamed(tmp_path), tokens, progress=False).nll, expected.nll)
    (tmp_path / "hidden").mkdir()
    spilled = sparselab.perplexity(streamed(tmp_path), tokens, progress=False, spill=tmp_path / "hidden")
    assert torch.equal(spilled.nll, expected.nll)


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = streamed(tmp_path)
    with Decoder(model).outside():
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
        assert not model.model.lm_head.weight.is_meta
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    for wanted in (None, torch.float32):
        model = streamed(tmp_path, dtype=wanted)
        with Decoder(model).block(0) as block:
            assert {weight.dtype for weight in block.parameters()} == {wanted or dtype}


def test_names_without_the_prefix_of_the_body(tmp_path):
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    whole.save_pretrained(tmp_path)
    held = load_file(tmp_path / SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # old files hold the mask
    save_file(bare, tmp_path / SINGLE, metadata={"format": "pt"})
    model = streamed(tmp_path)
    assert not any(model.misfit)
    with Decoder(model).block(1) as block:
        assert torch.equal(block.mlp.c_fc.weight, whole.transformer.h[1].mlp.c_fc.weight)


def test_a_head_that_should_be_tied_and_differs_is_refused(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    held = load_file(tmp_path / SINGLE)
    embedding = held["model.embed_tokens.weight"]
    save_file(held | {"lm_head.weight": embedding.clone()}, tmp_path / SINGLE, metadata={"format": "pt"})
    assert not any(streamed(tmp_path).misfit)
    save_file(held | {"lm_head.weight": embedding + 1}, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"are one weight by config.json and different ones in the files"):
        streamed(tmp_path)


def test_what_old_files_hold_besides_is_left(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    held = load_file(tmp_path / SINGLE)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(held, tmp_path / SINGLE, metadata={"format": "pt"})
    assert not any(streamed(tmp_path).misfit)


def test_files_say_the_dtype_where_the_configuration_does_not(tmp_path):
    tiny_llama().half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert streamed(tmp_path).model.dtype == torch.float16


def test_what_does_not_fit_is_refused(tmp_path, tokenizer):
    tiny_opt().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = load_file(tmp_path / SINGLE)
    save_file(held | {"model.extra.weight": torch.ones(2)}, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 weights for which its config.json has no place, first model.extra"):
        sparselab.stream(tmp_path)
    gone = {name: tensor for name, tensor in held.items() if "layers.1.fc1.weight" not in name}
    save_file(gone, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lack 1 weights, first model.decoder.layers.1.fc1.weight"):
        sparselab.stream(tmp_path)
    save_file(held, tmp_path / SINGLE, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 40}))
    with pytest.raises(ModelLoadError, match=r"is of shape \(48,\) in its files and of \(40,\) by config.json"):
        sparselab.stream(tmp_path)


def test_hidden_states_can_be_collected_from_it(tmp_path, tokens):
    tiny_llama().save_pretrained(tmp_path)
    expected = sparselab.collect(tiny_llama(), tokens, progress=False)
    for name, seen in sparselab.collect(streamed(tmp_path), tokens, progress=False).items():
        assert torch.equal(seen.hessian, expected[name].hessian)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_need_float32_stay_so(tmp_path, tokens, monkeypatch, dtype):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["input_layernorm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.1.mlp"])
    tiny_llama().save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {name: weight.dtype for name, weight in whole.state_dict().items()}
    assert len(set(expected.values())) == (1 if dtype == torch.float32 else 2)
    model = streamed(tmp_path, dtype=dtype)
    assert {name: weight.dtype for name, weight in model.model.state_dict().items()} == expected
    assert all(weight.dtype == expected[name] for name, weight in model.read(expected))
