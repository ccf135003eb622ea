import math

import pytest
import torch
from conftest import tiny_llama
from layers import layer

from sparselab import collect, methods, prune, solvers
from sparselab.errors import SingularHessianError
from sparselab.methods import METHODS, UPDATES, Settings, find
from sparselab.models.blocks import Decoder, read_weight
from sparselab.solvers import InputStatistics, damped, layer_error, parse_sparsity

QUIET = {"progress": False, "blocksize": 16}


def seen(X):
    statistics = InputStatistics(X.shape[1], dtype=torch.float64)
    statistics.update(X)
    return statistics


def solved(method, sparsity="50%", **settings):
    W, X, H = layer(12, 16)
    pattern = parse_sparsity(sparsity)
    [pruned] = find(method).solve([W], seen(X), pattern, Settings(method, pattern, blocksize=8, **settings))
    return W, H, pruned


@pytest.mark.parametrize("base", METHODS)
@pytest.mark.parametrize("sparsity", ["60%", "2:4"])
def test_updates_keep_the_mask_and_come_in_order_of_their_error(base, sparsity):
    errors = {}
    masks = []
    for update in UPDATES:
        W, H, pruned = solved(f"{base}+{update}", sparsity)
        errors[update] = layer_error(W, pruned, damped(H, 0.01))
        masks.append(pruned != 0)
    assert torch.equal(masks[0], solved(base, sparsity)[2] != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert errors["exact"] <= errors["cg"] * (1 + 1e-9) <= errors["sweep"] * (1 + 1e-9) <= errors["none"]
    assert errors["cg"] <= 1.001 * errors["exact"]


def test_each_update_is_its_solver():
    W, H, none = solved("wanda+none")
    keep = none != 0
    assert torch.equal(none, W * keep)
    torch.testing.assert_close(solved("wanda+sweep")[2], solvers.sparsegpt(W, H, 0.0, keep=keep, blocksize=8))
    torch.testing.assert_close(solved("wanda+exact")[2], solvers.reconstruct(W, damped(H, 0.01), keep))
    started = solvers.refine(W, damped(H, 0.01), keep, none, 20).weight
    torch.testing.assert_close(solved("wanda+cg")[2], started)


def test_what_a_method_and_its_update_need():
    needs = {name: find(name).needs for name in ("magnitude+none", "wanda+none", "wanda+cg", "magnitude+exact")}
    assert list(needs.values()) == ["nothing", "feature norms", "hessian", "hessian"]
    assert find("wanda+sweep").rounds
    assert find("sparsegpt+none").sweeps
    assert not find("sparsegpt+cg").rounds
    assert find("admm+cg").flop(10, 20) == find("admm").flop(10, 20) + find("ria+cg").flop(10, 20) > 0


@pytest.mark.parametrize("name", ["obs", "wanda+", "wanda+obs", "+cg", "", "wanda+cg+cg"])
def test_unknown_methods(name):
    with pytest.raises(ValueError, match=r"method: expected one of magnitude, .* \(\+none, \+sweep, \+cg, \+exact\)"):
        find(name)


@pytest.fixture
def registered(monkeypatch):
    """Room for methods that are gone after the test."""
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))


@pytest.mark.usefixtures("registered")
def test_a_method_of_ones_own_works_everywhere(llama, tokens):
    @methods.register("softened", needs="feature norms")
    def softened(weights, inputs, sparsity, settings):
        for weight in weights:
            scores = weight.abs() * inputs.feature_norm**0.25
            yield weight * solvers.keep_largest(scores, sparsity)

    report = prune(llama, tokens, "softened+cg", "50%", measure_error=False, **QUIET)
    assert report.sparsity == pytest.approx(0.5)
    dense = tiny_llama()
    first = prune(dense, tokens, "softened", "50%", **QUIET).layers.relative_error[0]
    again = tiny_llama()
    assert prune(again, tokens, "softened+cg", "50%", **QUIET).layers.relative_error[0] < first
    with pytest.raises(ValueError, match=r"name: expected a new name without '\+', received 'softened'"):
        methods.register("softened")


@pytest.mark.parametrize("method", ["sparsegpt", "admm+sweep"])
def test_weights_of_few_bits(llama, tokens, method):
    prune(llama, tokens, method, "50%", wbits=3, **QUIET)
    for linear in Decoder(llama).linears().values():
        values = [len(row.unique()) for row in read_weight(linear)]
        assert max(values) <= 8
        assert solvers.realised_sparsity(read_weight(linear)) >= 0.49


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "admm", "wbits": 4},
            "wbits: expected sparsegpt or an update by its sweep.* received method 'admm'",
        ),
        ({"method": "sparsegpt+cg", "wbits": 4}, "received method 'sparsegpt\\+cg'"),
        ({"wbits": 0}, "wbits: expected at least 1"),
        ({"true_sequential": True, "propagate": "dense"}, "true_sequential: expected propagate 'pruned'"),
        ({"retries": -1}, "retries: expected at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_true_sequential_calibrates_each_layer_on_the_pruned_ones_before_it(llama, tokens):
    """Against a plain loop: hooks on one group of layers after another, in the order of the block's own code."""
    expected, groups = (
        tiny_llama(),
        [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    )
    for block in expected.model.layers:
        for names in groups:
            linears = [module for name, module in block.named_modules() if name.rpartition(".")[2] in names]
            inputs = []
            hook = linears[0].register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1))
            )
            with torch.no_grad():
                expected(tokens)
            hook.remove()
            X = torch.cat(inputs)
            with torch.no_grad():
                for linear in linears:
                    linear.weight.copy_(solvers.sparsegpt(linear.weight, X.T @ X, "50%", blocksize=16))
    report = prune(llama, tokens, "sparsegpt", "50%", true_sequential=True, **QUIET)
    names = [row.layer.rpartition(".")[2] for row in report.layers.itertuples()]
    assert names == 3 * ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for (name, linear), other in zip(
        Decoder(llama).linears().items(), Decoder(expected).linears().values(), strict=True
    ):
        torch.testing.assert_close(
            linear.weight, other.weight, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )
    plain = tiny_llama()
    prune(plain, tokens, "sparsegpt", "50%", **QUIET)
    assert not torch.equal(plain.model.layers[0].mlp.down_proj.weight, llama.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, llama.model.layers[0].self_attn.q_proj.weight)


def test_a_singular_hessian_is_tried_again_only_if_asked_for(llama):
    few = torch.randint(0, 300, (1, 4), generator=torch.Generator().manual_seed(1))
    with pytest.raises(SingularHessianError, match=r"model\.layers\.0\.self_attn\.q_proj: .* with percdamp 0"):
        prune(llama, few, percdamp=0, **QUIET)
    with pytest.warns(UserWarning, match=r"layers\.\d.*trying again with percdamp 0\.0001"):
        report = prune(llama, few, percdamp=0, retries=3, **QUIET)
    assert report.layers.retries.max() >= 1
    raised = report.layers[report.layers.retries == 1]
    assert (raised.percdamp == 1e-4).all()


def test_the_report_says_what_damping_was_used(llama, tokens):
    report = prune(llama, tokens, "sparsegpt", percdamp=0.02, **QUIET)
    assert (report.layers.percdamp == 0.02).all()
    assert (report.layers.retries == 0).all()
    without = prune(tiny_llama(), tokens, "wanda", **QUIET)
    assert all(math.isnan(value) for value in without.layers.percdamp)


def test_the_gap_is_to_the_best_weights_under_the_mask(llama, tokens):
    dense = tiny_llama()
    seen = collect(dense, tokens, progress=False)
    report = prune(llama, seen, "sparsegpt", "50%", measure_gap=True, **QUIET)
    for row, (name, linear) in zip(report.layers.itertuples(), Decoder(llama).linears().items(), strict=True):
        weight, pruned, H = read_weight(dense.get_submodule(name)), read_weight(linear), seen[name].hessian.double()
        best = solvers.reconstruct(weight.double(), H, pruned != 0)
        expected = layer_error(weight.double(), pruned.double(), H) / layer_error(weight.double(), best, H)
        assert row.optimality_gap == pytest.approx(expected, rel=0.01)
    exact = prune(tiny_llama(), seen, "sparsegpt+exact", "50%", percdamp=1e-6, measure_gap=True, **QUIET)
    assert exact.layers.optimality_gap.max() < 1.01
    assert prune(tiny_llama(), seen, **QUIET).layers.optimality_gap.isna().all()
    with pytest.raises(ValueError, match="measure_gap: expected measure_error too"):
        prune(tiny_llama(), seen, measure_gap=True, measure_error=False, **QUIET)
