import math

import pytest
import torch
from conftest import FAMILIES, tiny_llama
from torch.utils.data import DataLoader

import sparselab
from sparselab import solvers
from sparselab.calibration import collect, collect_nested
from sparselab.errors import NonFiniteError, SingularHessianError, UnsupportedModelError
from sparselab.methods import METHODS, Settings
from sparselab.models.blocks import Decoder, read_weight
from sparselab.pruning import prune

QUIET = {"progress": False}


def weights(model):
    return {name: read_weight(linear).clone() for name, linear in Decoder(model).linears().items()}


def inputs_by_hand(model, tokens, name):
    """All inputs of one layer in the model's own forward, float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["50%", "2:4", "0%", "100%"])
def test_counts_and_report(model, tokens, method, sparsity):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = weights(model)
    report = prune(model, tokens, method, sparsity, blocksize=16, **QUIET)
    fraction = solvers.parse_sparsity(sparsity).fraction
    for row, (name, weight) in zip(report.layers.itertuples(), weights(model).items(), strict=True):
        assert name == f"{Decoder(model).blocks_name}.{row.block}.{row.layer}"
        assert (row.d_out, row.d_in) == weight.shape
        assert row.sparsity == pytest.approx(fraction, abs=0.02) == solvers.realised_sparsity(weight)
        if fraction == 0:
            assert torch.equal(weight, dense[name])
            assert row.relative_error == 0
    assert report.sparsity == pytest.approx(fraction, abs=0.01)
    pruned = set(Decoder(model).linears())
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in pruned:
            assert torch.equal(value, before[name]), f"{name} is not to be touched"


def test_each_layer_is_solved_on_the_inputs_it_gets_from_pruned_blocks(family, tokens):
    """The walk against a plain one: forward the whole model anew for every block, with the dense block in place."""
    model, plain = family(), family()
    prune(model, tokens, "sparsegpt", 0.5, blocksize=16, **QUIET)
    walked = weights(model)
    for index in range(3):
        prefix = f"{Decoder(plain).blocks_name}.{index}."
        inputs = {name: inputs_by_hand(plain, tokens, name) for name in walked if name.startswith(prefix)}
        for name, X in inputs.items():
            linear = plain.get_submodule(name)
            expected = solvers.sparsegpt(read_weight(linear), X.T @ X, 0.5, blocksize=16)
            same = ((expected == 0) == (walked[name] == 0)).float().mean()
            assert same > 0.99
            with torch.no_grad():
                linear.weight.copy_(walked[name])


def test_dense_propagation_uses_dense_inputs(llama, tokens):
    dense = tiny_llama()
    report = prune(llama, tokens, "wanda", 0.5, propagate="dense", **QUIET)
    for name, weight in weights(llama).items():
        X = inputs_by_hand(dense, tokens, name)
        expected = solvers.wanda(read_weight(dense.get_submodule(name)), X.norm(dim=0).float(), 0.5)
        assert ((expected == 0) == (weight == 0)).float().mean() > 0.99
    statistics = collect(dense, tokens, **QUIET)
    assert list(statistics) == list(weights(dense))
    last = report.layers.iloc[-1]
    name = list(statistics)[-1]
    original, pruned = read_weight(dense.get_submodule(name)), weights(llama)[name]
    assert last.relative_error == pytest.approx(
        solvers.relative_error(original, pruned, statistics[name].hessian), rel=1e-4
    )
    assert statistics[name].tokens == tokens.numel() == last.tokens


@pytest.mark.parametrize("method", METHODS)
def test_collected_statistics_serve_any_run_as_dense_propagation_does(tokens, method):
    walked, served = tiny_llama(), tiny_llama()
    collected = collect(served, tokens, **QUIET)
    first = prune(walked, tokens, method, 0.5, propagate="dense", **QUIET)
    second = prune(served, collected, method, 0.5, **QUIET)
    assert second.settings.propagate == "dense"
    torch.testing.assert_close(weights(served), weights(walked), rtol=0, atol=0)
    assert list(second.layers.relative_error) == list(first.layers.relative_error)
    assert (second.layers.tokens == tokens.numel()).all()
    del collected["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"statistics of all 21 layers.*none of model\.layers\.1\.mlp\.up_proj"):
        prune(served, collected, method, 0.5, **QUIET)


def test_nested_statistics_are_those_of_the_first_windows(llama, tokens):
    nested = collect_nested(llama, tokens, [7, 2, 10], **QUIET)
    assert list(nested) == [2, 7, 10]
    for size, collected in nested.items():
        for name, seen in collect(llama, tokens[:size], **QUIET).items():
            assert collected[name].tokens == seen.tokens == size * 24
            torch.testing.assert_close(collected[name].hessian, seen.hessian, rtol=1e-4, atol=1e-4)
        q, k, up = (
            collected[f"model.layers.1.{name}"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        )
        assert q is k
        assert q is not up
    assert nested[2]["model.layers.0.mlp.up_proj"] is not nested[7]["model.layers.0.mlp.up_proj"]
    for wrong in ([0, 2], [11], []):
        with pytest.raises(ValueError, match="sizes: expected numbers from 1 to the 10 windows"):
            collect_nested(llama, tokens, wrong, **QUIET)


def test_only_some_blocks_are_collected(llama, tokens):
    whole, some = collect(llama, tokens, **QUIET), collect(llama, tokens, blocks=[1], **QUIET)
    assert {name.split(".")[2] for name in some} == {"1"}
    assert all(torch.equal(seen.hessian, whole[name].hessian) for name, seen in some.items())
    with pytest.raises(ValueError, match=r"blocks: expected indices from 0 to 2, received \[3\]"):
        collect(llama, tokens, blocks=[1, 3], **QUIET)


def test_progress_is_told_of_every_layer_and_can_stop_the_work(llama, tokens):
    told = []

    def watch(done, total):
        told.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    before = weights(llama)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tokens, "wanda", progress=watch)
    assert told == [(n, 21) for n in range(1, 10)]
    changed = [name for name, weight in weights(llama).items() if not torch.equal(weight, before[name])]
    assert len(changed) == 9
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_batches_do_not_matter(tokens):
    reports = []
    for batch_size in (1, 3, 10):
        model = tiny_llama()
        reports.append(prune(model, tokens, batch_size=batch_size, blocksize=16, **QUIET).layers.relative_error)
    for other in reports[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(reports[0]), rtol=1e-3, atol=1e-6)


def test_repeats_bit_for_bit(tokens):
    first, second = tiny_llama(), tiny_llama()
    prune(first, tokens, **QUIET)
    prune(second, tokens, **QUIET)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_every_form_of_calibration_gives_the_same(tokens):
    forms = [tokens, list(tokens), DataLoader(tokens, batch_size=3), [(row[None], row[None]) for row in tokens]]
    results = []
    for form in forms:
        model = tiny_llama()
        prune(model, form, **QUIET)
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(model, tokens, dtype, method):
    report = prune(model.to(dtype), tokens, method, "2:4", **QUIET)
    assert all(weight.dtype == dtype for weight in weights(model).values())
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_flags_cache_and_hooks_are_restored(llama, tokens):
    llama.train()
    llama.model.layers[1].eval()
    flags = [module.training for module in llama.modules()]
    prune(llama, tokens, **QUIET)
    assert [module.training for module in llama.modules()] == flags
    assert llama.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_dropout_plays_no_part(tokens):
    model = FAMILIES["opt"]()
    model.config.dropout = 0.5
    other = FAMILIES["opt"]()
    prune(model.train(), tokens, **QUIET)
    prune(other.eval(), tokens, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(other).values(), strict=True))


def test_only_what_is_needed_is_measured(llama, tokens):
    report = prune(llama, None, "magnitude", 0.5, **QUIET)
    assert report.layers.relative_error.isna().all()
    assert (report.layers.tokens == 0).all()
    report = prune(llama, tokens, "wanda", 0.5, measure_error=False, **QUIET)
    assert math.isnan(report.relative_error)
    assert (report.layers.tokens == tokens.numel()).all()


def test_measuring_the_error_changes_no_weight(tokens):
    for method in METHODS:
        first, second = tiny_llama(), tiny_llama()
        prune(first, tokens, method, 0.6, measure_error=True, **QUIET)
        prune(second, tokens, method, 0.6, measure_error=False, **QUIET)
        assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sparsgpt"}, "expected one of magnitude, wanda, ria, sparsegpt, admm, .*received 'sparsgpt'"),
        ({"sparsity": 1.5}, "sparsity: expected a fraction from 0 to 1, received 1.5"),
        (
            {"sparsity": "2:3"},
            r"model\.layers\.0\.self_attn\.q_proj: pattern 2:3: M must divide d_in, received d_in 32",
        ),
        ({"sparsity": "2:4", "blocksize": 6}, "M must divide blocksize, received blocksize 6"),
        ({"percdamp": -0.1}, "percdamp: expected a finite number ≥ 0, received -0.1"),
        ({"percdamp": math.nan}, "percdamp"),
        ({"percdamp": 10**400}, "percdamp: expected a finite number ≥ 0, received 1000"),
        ({"blocksize": 0}, "blocksize: expected at least 1"),
        ({"propagate": "sideways"}, "propagate: expected 'pruned' or 'dense'"),
        ({"calib": None}, "sparsegpt needs calibration windows"),
        ({"calib": []}, "at least one window"),
        ({"calib": torch.full((1, 4), 300)}, "ids from 0 to 299"),
        ({"calib": torch.zeros(1, 65, dtype=torch.long)}, "64 positions"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_arguments_change_nothing(llama, tokens, arguments, message):
    before = weights(llama)
    with pytest.raises(ValueError, match=message):
        prune(llama, **{"calib": tokens} | arguments, **QUIET)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(llama).items())


def test_bad_weights_are_named_before_anything_is_done(llama, tokens):
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
    before = weights(llama)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj: the weight has NaN"):
        prune(llama, tokens, "magnitude", **QUIET)
    assert torch.equal(weights(llama)["model.layers.0.mlp.up_proj"], before["model.layers.0.mlp.up_proj"])


def test_bad_inputs_are_named(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[:] = torch.finfo(torch.float32).max
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.q_proj: a layer's inputs"):
        prune(llama, tokens, **QUIET)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"]
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_damage_outside_the_pruned_weights_is_named_too(tokens, name, calibrated):
    llama = tiny_llama(attention_bias=True)
    with torch.no_grad():
        llama.get_parameter(name).view(-1)[5] = math.nan
    before = weights(llama)
    with pytest.raises(NonFiniteError, match=rf"{name}: expected finite values"):
        prune(llama, tokens if calibrated else None, "magnitude", **QUIET)
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights(llama).items())


def test_a_layer_whose_outputs_cannot_be_measured_is_an_error_and_not_left_out_of_the_mean(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].self_attn.q_proj.weight.mul_(1e22)  # its squared outputs exceed float32
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.q_proj: the outputs' squared error"):
        prune(llama, tokens, "magnitude", **QUIET)


def test_too_much_damping_is_named(llama, tokens):
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.q_proj: .* lower percdamp"):
        prune(llama, tokens, percdamp=1e300, **QUIET)


def test_a_compensated_weight_that_does_not_fit_is_named(llama, tokens):
    collected = collect(llama, tokens, **QUIET)
    with torch.no_grad():
        llama.half().model.layers[2].mlp.up_proj.weight.fill_(6.5e4)
    with pytest.raises(
        NonFiniteError, match=r"layers\.2\.mlp\.up_proj: the compensated weight does not fit torch.float16"
    ):
        prune(llama, collected, measure_error=False, **QUIET)


def test_a_layer_without_outputs_has_no_relative_error(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.gate_proj.weight.zero_()
    report = prune(llama, tokens, "magnitude", **QUIET)
    lacking = report.layers[report.layers.relative_error.isna()]
    assert ("mlp.gate_proj", 1) in zip(lacking.layer, lacking.block, strict=True)
    assert report.relative_error == report.layers.relative_error.dropna().mean()


def test_matrices_stacked_in_a_way_that_is_not_known_are_refused_and_not_passed_over(llama, tokens):
    llama.model.layers[1].mlp.mixture = torch.nn.Parameter(torch.ones(4, 32, 48))
    before = weights(llama)
    for work in (lambda: prune(llama, None, "magnitude", **QUIET), lambda: collect(llama, tokens, **QUIET)):
        with pytest.raises(
            UnsupportedModelError, match=r"model\.layers\.1\.mlp\.mixture: expected weights .*\(4, 32, 48\)"
        ):
            work()
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights(llama).items())


def test_inference_mode_around_it_changes_nothing(tokens):
    with torch.inference_mode():
        loaded = tiny_llama()  # its parameters are inference tensors
        inside = prune(loaded, tokens.clone(), **QUIET)
    outside = tiny_llama()
    report = prune(outside, tokens, **QUIET)
    assert list(inside.layers.relative_error) == list(report.layers.relative_error)
    assert all(torch.equal(a, b) for a, b in zip(weights(loaded).values(), weights(outside).values(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocksize": "128"}, "blocksize: expected a whole number, received str '128'"),
        ({"blocksize": None}, "blocksize: expected a whole number, received NoneType None"),
        ({"blocksize": 1.5}, "blocksize: expected a whole number, received float 1.5"),
        ({"percdamp": "x"}, "percdamp: expected a number, received str 'x'"),
        ({"percdamp": None}, "percdamp: expected a number, received NoneType None"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number, received float 1.5"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_arguments_of_the_wrong_kind_change_nothing(llama, tokens, arguments, message):
    before = weights(llama)
    with pytest.raises(TypeError, match=message):
        prune(llama, tokens, **arguments, **QUIET)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(llama).items())


def test_a_singular_hessian_is_named_and_never_replaced(llama, monkeypatch):
    monkeypatch.setattr("sparselab.solvers.hessian._damped_diagonal", lambda hessian, _: -hessian.diagonal())
    with pytest.raises(SingularHessianError, match=r"model\.layers\.0\.self_attn\.q_proj: .* raise percdamp"):
        prune(llama, torch.ones(1, 4, dtype=torch.long), percdamp=0.0, **QUIET)


def test_settings_are_frozen():
    settings = Settings()
    with pytest.raises(AttributeError):
        settings.method = "wanda"


@pytest.mark.slow
def test_bundled_model_at_60_percent_orders_the_methods(bundled):
    model, _, calib, held_out = bundled
    dense = weights(model)
    results = {"dense": float(sparselab.perplexity(model, held_out, progress=False))}
    for method in ("sparsegpt", "wanda", "magnitude"):
        prune(model, calib, method, 0.6, **QUIET)
        results[method] = float(sparselab.perplexity(model, held_out, progress=False))
        for name, linear in Decoder(model).linears().items():
            linear.weight.data.copy_(dense[name])
    assert results["dense"] < results["sparsegpt"] < results["wanda"] < results["magnitude"], results


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_gives_the_cpus_errors(tokens, dtype):
    on_cpu = prune(tiny_llama().to(dtype), tokens, **QUIET)
    on_gpu = prune(tiny_llama().to(dtype).cuda(), tokens, **QUIET)
    rtol = 1e-2 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        torch.tensor(on_gpu.layers.relative_error), torch.tensor(on_cpu.layers.relative_error), rtol=rtol, atol=1e-4
    )


@pytest.mark.usefixtures("untyped")
def test_kernels_have_names(llama, tokens):
    with pytest.raises(ValueError, match="kernel: expected one of auto, numba, torch, triton, received 'cuda'"):
        prune(llama, tokens, kernel="cuda", **QUIET)


def test_the_report_says_where_the_time_went(llama, tokens):
    report = prune(llama, tokens, **QUIET)
    assert list(report.stages) == ["forward", "statistics", "factorise", "sweep", "error"]
    assert 0.5 * report.seconds < sum(report.stages.values()) <= report.seconds
    assert set(prune(tiny_llama(), None, "magnitude", **QUIET).stages) >= {"sweep"}
