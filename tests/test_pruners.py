import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM

import sparselab
from sparselab.solvers import realised_sparsity


def test_the_interface_of_the_seed_document(llama, tokens, tmp_path):
    pruner = sparselab.SparseGPT(llama)
    pruned = pruner.prune(calib_data=tokens, sparsity=0.5, prunen=2, prunem=4, percdamp=0.01, use_zero=False)
    assert pruned is llama
    pruned.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = again.model.layers[2].mlp.down_proj.weight
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert str(pruner.report.settings.pattern) == "2:4"


@pytest.mark.parametrize("name", ["SparseGPT", "Wanda", "Magnitude"])
def test_classes_do_what_prune_does(name, tokens):
    one, other = tiny_llama(), tiny_llama()
    getattr(sparselab, name)(one).prune(tokens, sparsity=0.6, progress=False)
    sparselab.prune(other, tokens, name.lower(), 0.6, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_prunen_counts_the_pruned(llama, tokens):
    sparselab.Wanda(llama).prune(tokens, prunen=3, prunem=4, progress=False)
    assert realised_sparsity(llama.model.layers[0].mlp.up_proj.weight) == 0.75


def test_a_pattern_in_words(llama, tokens):
    pruner = sparselab.SparseGPT(llama)
    pruner.prune(tokens, sparsity="2:4", progress=False)
    assert str(pruner.report.settings.pattern) == "2:4"


@pytest.mark.usefixtures("untyped")
def test_counts_are_whole(llama, tokens):
    with pytest.raises(TypeError, match=r"prunen: expected a whole number, received float 2\.0"):
        sparselab.SparseGPT(llama).prune(tokens, prunen=2.0, prunem=4)
    with pytest.raises(TypeError, match=r"prunem: expected a whole number, received float 4\.5"):
        sparselab.SparseGPT(llama).prune(tokens, prunen=2, prunem=4.5)


def test_refusals(llama, tokens):
    with pytest.raises(ValueError, match="use_zero"):
        sparselab.SparseGPT(llama).prune(tokens, use_zero=True)
    with pytest.raises(ValueError, match="prunem"):
        sparselab.SparseGPT(llama).prune(tokens, prunen=2)
    with pytest.raises(ValueError, match="wanda needs calibration"):
        sparselab.Wanda(llama).prune()
    sparselab.Magnitude(llama).prune(progress=False)
