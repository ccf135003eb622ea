import pytest
import torch
from conftest import tiny_llama

from sparselab import collect, prune
from sparselab.allocation import Allocation, Rule, parse_allocation
from sparselab.models.blocks import Decoder, read_weight
from sparselab.outliers import owl
from sparselab.solvers import NM, Unstructured, realised_sparsity, wanda

QUIET = {"progress": False, "blocksize": 16}
LAYERS = [(index, name) for index in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ("1", [(1, "self_attn.q_proj"), (1, "mlp.up_proj")]),
        ("1-2", [(i, name) for i, name in LAYERS if i > 0]),
        ("mlp.*", [(i, "mlp.up_proj") for i in range(3)]),
        ("q_proj", [(i, "self_attn.q_proj") for i in range(3)]),
        ("0-1:*up*", [(0, "mlp.up_proj"), (1, "mlp.up_proj")]),
        ("2:q_proj", [(2, "self_attn.q_proj")]),
        ("*", LAYERS),
        ("7", []),
    ],
)
def test_what_a_rule_is_about(where, fits):
    rule = Rule(where, None)
    assert [layer for layer in LAYERS if rule.fits(*layer)] == fits


def test_the_first_rule_that_fits_decides_and_what_none_fits_stays():
    allocation = parse_allocation("0=dense, 1-2:mlp.*=2:4, 2=70%")
    assert allocation == Allocation((Rule("0", None), Rule("1-2:mlp.*", NM(2, 4)), Rule("2", Unstructured(0.7))))
    assert [allocation.at(*layer) for layer in LAYERS] == [None, None, None, NM(2, 4), Unstructured(0.7), NM(2, 4)]
    assert str(allocation) == "0=dense,1-2:mlp.*=2:4,2=70%"
    assert parse_allocation(str(allocation)) == allocation == parse_allocation(allocation)
    assert parse_allocation({"0": "dense", "1-2:mlp.*": "2:4", "2": 0.7}) == allocation
    assert parse_allocation("2:4") == NM(2, 4)
    assert parse_allocation(0.5) == Unstructured(0.5)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("2-1=50%", "expected blocks from a lower to a higher number, received '2-1'"),
        ("=50%", r"expected rules for blocks \('0-2'\), names \('mlp\.\*'\) or both"),
        (":mlp=50%", "expected rules for blocks"),
        ("1:=50%", "expected rules for blocks"),
        ("a:mlp=50%", "expected rules for blocks"),
        ("0=lots", "sparsity: expected a fraction"),
        ({}, "expected a rule or more, received none"),
        ({"0": 1.5}, "expected a fraction from 0 to 1"),
    ],
)
def test_rules_that_cannot_be_read(sparsity, message):
    with pytest.raises(ValueError, match=message):
        parse_allocation(sparsity)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "wanda+sweep"])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_each_layer_is_pruned_as_its_rule_says(llama, tokens, method, propagate):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    rules = {"1": "dense", "q_proj": 0.25, "0:mlp.*": "2:4", "2:mlp.up_proj": "75%"}
    report = prune(llama, tokens, method, rules, propagate=propagate, **QUIET)
    expected = {}
    for index in (0, 2):
        expected[index, "self_attn.q_proj"] = 0.25
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected[0, f"mlp.{name}"] = 0.5
    expected[2, "mlp.up_proj"] = 0.75
    assert {(row.block, row.layer): row.sparsity for row in report.layers.itertuples()} == pytest.approx(
        expected, abs=0.02
    )
    decoder = Decoder(llama)
    for index, name in decoder.layers():
        full = f"{decoder.block_prefix(index)}{name}"
        weight = llama.get_submodule(full).weight
        if (index, name) in expected:
            assert realised_sparsity(weight) == pytest.approx(expected[index, name], abs=0.02)
        else:
            assert torch.equal(weight, before[f"{full}.weight"])


def test_layers_that_share_inputs_and_not_a_pattern_get_what_they_would_alone(llama, tokens):
    prune(llama, tokens, "wanda", {"0:q_proj": 0.3, "0:k_proj": 0.6}, **QUIET)
    dense = tiny_llama()
    seen = collect(dense, tokens, progress=False)["model.layers.0.self_attn.q_proj"]
    for name, fraction in (("q_proj", 0.3), ("k_proj", 0.6)):
        alone = wanda(read_weight(dense.model.layers[0].self_attn.get_submodule(name)), seen.feature_norm, fraction)
        assert torch.equal(llama.model.layers[0].self_attn.get_submodule(name).weight, alone)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"3": 0.5}, "expected rules for layers such as 0:self_attn.q_proj or 2:mlp.down_proj, received '3=50%'"),
        ({"mpl.*": 0.5}, "which fits none"),
        ({"*": "dense"}, "expected a rule that prunes a layer"),
        ({"mlp.*": "3:5"}, r"model\.layers\.0\.mlp\.gate_proj: pattern 3:5: M must divide d_in"),
    ],
)
def test_rules_that_fit_no_layer_of_the_model_are_refused_before_the_work(llama, tokens, rules, message):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(llama, tokens, "magnitude", rules, **QUIET)
    torch.testing.assert_close(dict(llama.state_dict()), before, rtol=0, atol=0)


def test_owl_prunes_blocks_with_more_outliers_less(tokens):
    model = tiny_llama()
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.up_proj, model.model.layers[1].self_attn.q_proj):
            linear.weight[:, :2] *= 30  # block 1 has outliers now
    allocation = owl(model, tokens, 0.6, progress=False)
    fractions = [allocation.at(index, "mlp.up_proj").fraction for index in range(3)]
    assert sum(fractions) / 3 == pytest.approx(0.6, abs=1e-4)
    assert max(fractions) - min(fractions) == pytest.approx(0.16, abs=1e-4)
    assert parse_allocation(str(allocation)) == allocation
    assert min(fractions) == fractions[1]
    report = prune(model, tokens, "wanda", allocation, **QUIET)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


def test_owl_counts_scores_above_the_mean_of_the_block(tokens):
    model, shares = tiny_llama(), []
    collected = collect(model, tokens, progress=False)
    for index in range(3):
        prefix = f"model.layers.{index}."
        scores = torch.cat(
            [
                (model.get_submodule(name).weight.detach().abs() * seen.feature_norm).flatten()
                for name, seen in collected.items()
                if name.startswith(prefix)
            ]
        )
        shares.append(sum(float(score) > 3 * float(scores.mean()) for score in scores) / len(scores))
    low, high = min(shares), max(shares)
    raw = [0.1 * (share - low) / (high - low) for share in shares]
    expected = [0.5 - value + sum(raw) / 3 for value in raw]
    allocation = owl(model, tokens, "50%", threshold=3, spread=0.05, progress=False)
    assert [rule.pattern.fraction for rule in allocation.rules] == pytest.approx(expected, abs=1e-4)


def test_owl_refuses_what_it_cannot_do(llama, tokens):
    with pytest.raises(ValueError, match="expected a fraction, received 2:4"):
        owl(llama, tokens, "2:4", progress=False)
    with pytest.raises(ValueError, match=r"expected above 0, and from 0 to 0\.5; received 0, 0\.08"):
        owl(llama, tokens, 0.5, threshold=0, progress=False)
    with pytest.raises(ValueError, match=r"leaves all sparsities from 0 to 1, received 0\.4"):
        owl(llama, tokens, 0.9, threshold=2, spread=0.4, progress=False)
