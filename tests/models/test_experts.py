import pytest
import torch
import torch.nn.functional as F
from families import MIXTURES, tiny

from sparselab import collect, prune
from sparselab.models.blocks import Decoder, evaluating, find_linears
from sparselab.models.experts import Expert

QUIET = {"progress": False}
MANY = torch.randint(0, 300, (40, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return tiny(request.param)


def routed(model, tokens, index):
    """What enters each expert of a block, by the model's own routing; and its weight in the result."""
    caught = []
    experts = model.model.layers[index].mlp.experts
    hook = experts.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((*args, *kwargs.values())), with_kwargs=True
    )
    with evaluating(model):
        model(tokens)
    hook.remove()
    hidden, chosen, _ = caught[0]
    return {expert: hidden[(chosen == expert).any(dim=1)] for expert in range(4)}


def inside(experts, expert, inputs):
    """What enters the expert's second matrix."""
    if experts.is_transposed:
        return experts._apply_gate(inputs @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert])
    gate, value = F.linear(inputs, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * value


def test_statistics_are_those_of_the_tokens_routed_to_each(mixture):
    seen = collect(mixture, MANY, **QUIET)
    assert mixture.config._experts_implementation == "grouped_mm", "as it was"
    for index in range(2):
        experts = mixture.model.layers[index].mlp.experts
        for expert, inputs in routed(mixture, MANY, index).items():
            prefix = f"model.layers.{index}.mlp.experts"
            up = seen[f"{prefix}.gate_up_proj.{expert}"]
            assert up.tokens == len(inputs)
            torch.testing.assert_close(up.hessian, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
            inner = inside(experts, expert, inputs)
            down = seen[f"{prefix}.down_proj.{expert}"]
            torch.testing.assert_close(down.hessian, inner.T @ inner, rtol=1e-4, atol=1e-6)


def test_each_expert_is_solved_by_itself(mixture):
    from sparselab import solvers

    seen = collect(mixture, MANY, **QUIET)
    dense = {name: linear.weight.detach().clone() for name, linear in Decoder(mixture).linears().items()}
    report = prune(mixture, seen, "sparsegpt", "2:4", **QUIET)
    assert report.layers.calibrated.all()
    for name, linear in Decoder(mixture).linears().items():
        if isinstance(linear, Expert):
            expected = solvers.sparsegpt(dense[name], seen[name].hessian, "2:4")
            torch.testing.assert_close(linear.weight.detach(), expected)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_experts_with_too_few_tokens_are_pruned_without_them_and_reported(method):
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = -100 * model.model.layers[0].mlp.gate.weight[1]  # chosen by few
    dense = model.model.layers[0].mlp.experts.gate_up_proj[2].detach().clone()
    tokens = MANY[:4]
    if method == "magnitude":
        assert prune(model, tokens, method, "50%", **QUIET).layers.calibrated.all(), "it asks for none"
        return
    with pytest.warns(
        UserWarning, match=r"layers are experts that fewer tokens were routed to than they have inputs, first model"
    ):
        report = prune(model, tokens, method, "50%", **QUIET)
    starved = report.layers[~report.layers.calibrated]
    assert set(starved.layer.str.rpartition(".")[0]) <= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    left = dense.abs().sort(dim=1).values[:, dense.shape[1] // 2 :] if method == "wanda" else None
    row = report.layers.query("block == 0 and layer == 'mlp.experts.gate_up_proj.2'").iloc[0]
    if not row.calibrated:
        pruned = model.model.layers[0].mlp.experts.gate_up_proj[2]
        assert torch.equal(pruned[pruned != 0], dense[pruned != 0]), "nothing to compensate with"
        if left is not None:
            assert torch.equal(pruned.abs().sort(dim=1).values[:, dense.shape[1] // 2 :], left)


def test_an_expert_that_no_token_reaches(tokens):
    model = tiny("mixtral")
    router = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        router[3] = 0
        router[:3] = torch.randn(3, 32)
        router[3] -= router[:3].sum(dim=0)
    with pytest.warns(UserWarning, match="calibrate on more tokens"):
        report = prune(model, tokens[:1], **QUIET)
    assert report.layers.sparsity.eq(0.5).all()
    assert report.layers[report.layers.tokens == 0].relative_error.isna().all()


def test_true_sequential_takes_the_experts_of_a_stack_together(mixture, monkeypatch):
    from sparselab import walk

    passes = []
    real = walk.observe
    monkeypatch.setattr(walk, "observe", lambda *given: passes.append(sorted(given[-1])) or real(*given))
    report = prune(mixture, MANY, "wanda", "50%", true_sequential=True, **QUIET)
    assert report.layers.sparsity.eq(0.5).all()
    together = [names for names in passes if "mlp.experts.gate_up_proj.0" in names and "self_attn.q_proj" not in names]
    assert together
    assert all(f"mlp.experts.gate_up_proj.{expert}" in names for names in together for expert in range(4))


def test_routers_are_left_alone(mixture):
    assert not [name for name in find_linears(mixture.model.layers[0]) if name.endswith("gate")]
