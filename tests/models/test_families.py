"""Every family is replayed, pruned, streamed, saved and opened again, by code that knows none of them."""

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny
from transformers import AutoModelForCausalLM

import sparselab
from sparselab import perplexity, prune, prune_checkpoint
from sparselab.models.blocks import Decoder, evaluating

# Of mixtures: routers, and the biases of experts, stacked like their matrices.
NOT_MATRICES = (".mlp.gate.weight", ".mlp.router.weight", ".shared_expert_gate.weight", "_proj_bias")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny(family)


def zeros(weights):
    return {name: weight == 0 for name, weight in weights.items() if weight.ndim >= 2}


def test_blocks_replayed_are_the_models_own_forward(model, tokens):
    decoder = Decoder(model)
    with evaluating(model):
        expected = model(tokens).logits
        hidden, calls = decoder.embed(tokens)
        for index, call in enumerate(calls):
            hidden = decoder.run_block(index, hidden, call)
        assert torch.equal(decoder.head(hidden), expected)


def test_all_matrices_of_the_blocks_are_found_and_nothing_else(model, family):
    decoder = Decoder(model)
    matrices = {
        name
        for name, weight in model.named_parameters()
        if weight.ndim >= 2
        and not decoder.is_outside(name)
        and not name.endswith(NOT_MATRICES if family in MIXTURES else ())
    }
    found = {name.rpartition(".")[0] if ".experts." in name else f"{name}.weight" for name in decoder.linears()}
    assert found == matrices
    assert (len(decoder.linears()) > len(matrices)) == (family in MIXTURES)


def test_pruned_where_it_should_be_and_as_it_was_elsewhere(model, tokens):
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    prune(model, tokens, "sparsegpt", "50%", progress=False)
    for name, linear in Decoder(model).linears().items():
        assert (linear.weight == 0).double().mean() == 0.5, name
    found = [name.rpartition(".")[0] if ".experts." in name else f"{name}.weight" for name in Decoder(model).linears()]
    others = dense.keys() - found
    assert others
    for name in others:
        assert torch.equal(model.state_dict()[name], dense[name]), name


def test_streamed_and_opened_again_it_is_what_it_is_in_memory(model, tokens, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    streamed, _ = sparselab.stream(tmp_path / "model", "cpu")
    assert torch.equal(perplexity(streamed, tokens, progress=False).nll, perplexity(model, tokens, progress=False).nll)
    prune_checkpoint(streamed, tokenizer, tokens, tmp_path / "out", progress=False)
    report = prune(model, tokens, progress=False)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert zeros(saved.state_dict()).keys() == zeros(model.state_dict()).keys()
    for name, mask in zeros(model.state_dict()).items():
        assert torch.equal(saved.state_dict()[name] == 0, mask), name
    assert report.sparsity == 0.5
    with torch.no_grad():
        assert torch.equal(saved(tokens).logits, model(tokens).logits)
