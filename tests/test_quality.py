import math

import pytest
import torch
from conftest import tiny_llama

import sparselab
from sparselab import quality, solvers
from sparselab.errors import NonFiniteError
from sparselab.models.blocks import Decoder, read_weight
from sparselab.quality import copy_weights, layer_quality

GAP = 0.01  # what a gap may be off, relative
METHODS = ["magnitude", "wanda", "sparsegpt"]


def windows(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 300, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calib():
    return windows(10, 1)


@pytest.fixture
def held_out():
    return windows(6, 2)


def pruned(model, calib, method="sparsegpt", sparsity="50%"):
    """The model, pruned in place, and its weights before."""
    dense = copy_weights(model)
    sparselab.prune(model, calib, method, sparsity, blocksize=16, progress=False)
    return model, dense


def by_definition(model, dense, tokens):
    """Every layer's relative error and gap from inputs seen in the model's own forward, in float64."""
    linears, inputs = Decoder(model).linears(), {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    found = []
    for name, linear in linears.items():
        W, P, X = dense[name].double(), read_weight(linear).double(), inputs[name].double()
        best = solvers.reconstruct(W, X.T @ X, P != 0)
        outputs, error, least = ((X @ each.T).square().sum() for each in (W, W - P, W - best))
        found.append((float(error / outputs), float(error / least)))
    return found


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_errors_and_gaps_are_those_of_their_definition(family, calib, held_out, method, sparsity):
    model, dense = pruned(family(), calib, method, sparsity)
    table = layer_quality(model, dense, calib, held_out, progress=False)
    assert list(table.columns) == [
        "block", "layer", "calibration_error", "heldout_error", "optimality_gap", "residual",
    ]  # fmt: skip
    names = [f"{Decoder(model).block_prefix(row.block)}{row.layer}" for row in table.itertuples()]
    assert names == list(dense)
    errors, gaps = zip(*by_definition(model, dense, calib), strict=True)
    others = [error for error, _ in by_definition(model, dense, held_out)]
    assert table.calibration_error.tolist() == pytest.approx(errors, rel=1e-4)
    assert table.heldout_error.tolist() == pytest.approx(others, rel=1e-4)
    assert table.optimality_gap.tolist() == pytest.approx(gaps, rel=GAP)
    assert (table.optimality_gap > 1 - 1e-5).all()
    assert (table.residual < 1e-3).all()


def test_compensation_shows_in_both_columns(calib, held_out):
    tables = {
        method: layer_quality(*pruned(tiny_llama(), calib, method), calib, held_out, progress=False)
        for method in METHODS
    }
    means = {
        method: table[["calibration_error", "heldout_error", "optimality_gap"]].mean()
        for method, table in tables.items()
    }
    fitted, chosen = means["sparsegpt"], means["wanda"]
    assert fitted.optimality_gap < chosen.optimality_gap
    over = [each.heldout_error / each.calibration_error - 1 for each in (fitted, chosen)]
    assert over[0] > 1.5 * over[1] > 0


def test_the_best_weights_have_no_gap(calib):
    model, dense = pruned(tiny_llama(), calib)
    for index in range(3):  # each block on what the ones before it send
        seen = sparselab.collect(model, calib, progress=False, blocks=[index])
        for name, statistics in seen.items():
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(solvers.reconstruct(dense[name], statistics.hessian, weight != 0))
            break  # its other layers' inputs are other ones now
    table = layer_quality(model, dense, calib, progress=False)
    first = table.layer == "self_attn.q_proj"
    assert table.optimality_gap[first].tolist() == pytest.approx([1] * 3, abs=1e-4)
    assert (table.optimality_gap[~first] > 1.001).all()


def test_a_model_that_was_never_pruned(llama, calib, held_out):
    table = layer_quality(llama, copy_weights(llama), calib, held_out, progress=False)
    assert (table[["calibration_error", "heldout_error"]] == 0).all(axis=None)
    assert table[["optimality_gap", "residual"]].isna().all(axis=None)


def test_without_held_out_text_its_error_is_unknown_and_the_rest_is_the_same(llama, calib, held_out):
    model, dense = pruned(llama, calib)
    whole = layer_quality(model, dense, calib, held_out, progress=False)
    table = layer_quality(model, dense, calib, batch_size=3, progress=False)
    assert table.heldout_error.isna().all()
    assert table.calibration_error.tolist() == pytest.approx(whole.calibration_error.tolist(), rel=1e-4)
    assert table.optimality_gap.tolist() == pytest.approx(whole.optimality_gap.tolist(), rel=1e-3)


def test_half_precision_is_held_to_weights_that_are_not_rounded(calib):
    model, dense = pruned(tiny_llama().bfloat16(), calib)
    [(name, seen), *_] = sparselab.collect(model, calib, progress=False, blocks=[0]).items()
    W, linear = dense[name].float(), Decoder(model).linears()[name]
    best = solvers.reconstruct(W, seen.hessian, linear.weight != 0)
    with torch.no_grad():
        linear.weight.copy_(best)
    of_rounding = solvers.layer_error(W, linear.weight, seen.hessian) / solvers.layer_error(W, best, seen.hessian)
    table = layer_quality(model, dense, calib, progress=False)
    assert table.optimality_gap[0] == pytest.approx(of_rounding, abs=1e-6)
    assert of_rounding > 1 + 1e-5


def test_the_model_does_not_change_and_statistics_of_one_block_are_held(llama, calib, monkeypatch):
    model, dense = pruned(llama, calib)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told, blocks = [], []
    seen = quality.observe
    monkeypatch.setattr(quality, "observe", lambda *args: blocks.append((args[1], len(told))) or seen(*args))
    layer_quality(model, dense, calib, progress=lambda *news: told.append(news))
    assert blocks == [(0, 0), (1, 7), (2, 14)], "a block's rows are there before the next is looked at"
    assert told == [(done, 21) for done in range(1, 22)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_without_outputs(llama, calib):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.zero_()
    model, dense = pruned(llama, calib)
    row = layer_quality(model, dense, calib, progress=False).query("block == 1 and layer == 'mlp.up_proj'").iloc[0]
    assert math.isnan(row.calibration_error)
    assert math.isnan(row.optimality_gap)


def test_a_weight_that_is_not_finite_is_named(llama, calib):
    model, dense = pruned(llama, calib)
    dense["model.layers.2.mlp.up_proj"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj: the outputs' squared error"):
        layer_quality(model, dense, calib, progress=False)


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments(llama, calib):
    dense = copy_weights(llama)
    first = "model.layers.0.self_attn.q_proj"

    def refused(error, message, weights=dense, tokens=calib, held_out=None):
        with pytest.raises(error, match=message):
            layer_quality(llama, weights, tokens, held_out, progress=False)

    refused(TypeError, "dense_weights: expected what copy_weights gives, received list", [1, 2])
    lacking = {name: weight for name, weight in dense.items() if name != first}
    refused(ValueError, rf"expected one for each of 21 layers, received none for {first}; copy_weights", lacking)
    other = dense | {first: dense[first][:3]}
    refused(ValueError, rf"expected shape \(32, 32\) for {first}, received \(3, 32\)", other)
    refused(TypeError, f"expected tensors, received ndarray for {first}", dense | {first: dense[first].numpy()})
    refused(TypeError, "expected token windows, received NoneType", tokens=None)
    refused(ValueError, "ids from 0 to 299", held_out=calib + 300)
    with pytest.raises(TypeError, match="expected a transformers model, received Linear"):
        layer_quality(torch.nn.Linear(2, 2), dense, calib)
