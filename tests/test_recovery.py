import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama, tiny_opt
from torch import nn

from sparselab import recovery
from sparselab.errors import NonFiniteError, SparselabError, UnsupportedModelError
from sparselab.models.blocks import Decoder
from sparselab.models.streamed import StreamedModel
from sparselab.pruning import prune
from sparselab.recovery import recover

QUIET = {"progress": False}
BRISK = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4}
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW as published, and in torch


def pruned(model, tokens, method="wanda", sparsity="60%"):
    prune(model, tokens, method, sparsity, **QUIET)
    return model


def state(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def masks(model):
    return {f"{name}.weight": linear.weight.detach() == 0 for name, linear in Decoder(model).linears().items()}


def next_token_loss(model, tokens):
    logits = model(tokens).logits
    return torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, tokens, strict=True)]).mean()


def adamw_by_hand(model, tokens, keep, rates, decay):
    """Masked AdamW as Loshchilov & Hutter write it, on all windows in every step; losses, and weights in place."""
    weights = {name: weight for name, weight in model.named_parameters() if name in keep}
    m, v = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    losses = []
    for step, rate in enumerate(rates, start=1):
        loss = next_token_loss(model, tokens)
        losses.append(float(loss.detach()))
        for (name, weight), gradient in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            gradient = gradient * keep[name]
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * gradient
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * gradient**2
            change = m[name] / (1 - BETAS[0] ** step) / ((v[name] / (1 - BETAS[1] ** step)).sqrt() + EPS)
            weight.data = weight.data - rate * change - rate * (decay if weight.ndim > 1 else 0) * weight.data
    return losses


@pytest.mark.parametrize("train", ["pruned layers", "all"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_adamw_by_hand_in_float64(family, tokens, train, decay):
    model, by_hand = (pruned(family(), tokens).double() for _ in range(2))
    keep = {name: ~mask for name, mask in masks(by_hand).items()}
    if train == "all":
        keep = {name: keep.get(name, torch.tensor(True)) for name, _ in by_hand.named_parameters()}
    result = recover(
        model, tokens, 12, 1e-2, len(tokens), warmup=3, weight_decay=decay, train=train, **QUIET
    )  # fmt: skip
    rates = [1e-2 * part for part in (1 / 3, 2 / 3, 1)]
    rates += [1e-2 * (1 + math.cos(math.pi * done / 9)) / 2 for done in range(9)]
    losses = adamw_by_hand(by_hand, tokens, keep, rates, decay)
    assert list(result.steps.learning_rate) == pytest.approx(rates)
    assert list(result.steps.loss) == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < losses[0] - 1e-3, "the steps are large enough to tell"
    for (name, weight), (_, expected) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("train", ["pruned layers", "all"])
@pytest.mark.parametrize("sparsity", ["60%", "2:4", "100%"])
def test_the_mask_holds_after_every_step(family, tokens, train, sparsity):
    model = pruned(family(), tokens, "sparsegpt", sparsity)
    before, seen = masks(model), []

    def watch(done, total):
        seen.append((done, total))
        assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())

    recover(model, tokens, **BRISK, weight_decay=0.5, train=train, progress=watch)
    assert seen == [(n, 12) for n in range(1, 13)]


def test_only_kept_weights_of_pruned_layers_change(family, tokens):
    model = pruned(family(), tokens)
    untouched = next(iter(Decoder(model).linears()))
    with torch.no_grad():
        Decoder(model).linears()[untouched].weight.fill_(0.01)  # one that is not pruned
    before, zero = state(model), masks(model)
    result = recover(model, tokens, **BRISK, **QUIET)
    trained = {name for name, mask in zero.items() if mask.any()}
    assert f"{untouched}.weight" not in trained
    for name, weight in model.named_parameters():
        changed = weight != before[name]
        assert not (changed & zero[name]).any() if name in trained else not changed.any(), name
        if name in trained:  # a few get no gradient: nothing that is kept reads their output
            assert changed.sum() > 0.9 * (~zero[name]).sum(), name
    assert result.trained == sum(int((~zero[name]).sum()) for name in trained)
    sizes = sum(zero[name].numel() for name in trained)
    assert result.sparsity == pytest.approx(1 - result.trained / sizes)


def test_all_parameters_are_trained_when_asked_for(family, tokens):
    model = pruned(family(), tokens)
    before, zero = state(model), masks(model)
    result = recover(model, tokens, **BRISK, train="all", **QUIET)
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())
    pruned_away = sum(int(mask.sum()) for mask in zero.values())
    assert result.trained == sum(weight.numel() for weight in before.values()) - pruned_away


def test_the_loss_falls(model, tokens):
    pruned(model, tokens)
    with torch.no_grad():
        before = float(next_token_loss(model, tokens))
    losses = recover(model, tokens, steps=40, learning_rate=1e-2, batch_size=len(tokens), **QUIET).steps.loss
    with torch.no_grad():
        after = float(next_token_loss(model, tokens))
    assert losses.iloc[0] == pytest.approx(before, rel=1e-5)
    assert after < losses.iloc[-1] < before - 5e-3


def test_repeats_bit_for_bit_and_by_seed_alone(tokens):
    runs = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        model = pruned(tiny_opt(dropout=0.5), tokens).train()
        torch.manual_seed(noise)
        steps = recover(model, tokens, **BRISK, seed=seed, **QUIET).steps
        assert model.training
        runs.append((steps, state(model)))
    (first, weights), (second, same), (third, other) = runs
    assert first.equals(second)
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert not first.loss.equals(third.loss)
    assert any(not torch.equal(weight, other[name]) for name, weight in weights.items())


def test_every_window_is_seen_before_any_is_seen_again(llama, tokens, monkeypatch):
    pruned(llama, tokens)
    seen = []
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda **given: seen.append(given["input_ids"]) or forward(**given))
    recover(llama, tokens, steps=5, batch_size=4, **QUIET)
    assert [len(batch) for batch in seen] == [4] * 5
    rows = [tuple(row.tolist()) for row in torch.cat(seen)]
    everything = {tuple(row.tolist()) for row in tokens}
    assert set(rows[:10]) == set(rows[10:]) == everything
    assert rows[:10] != rows[10:] != [tuple(row.tolist()) for row in tokens]


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_unless_told_otherwise(llama, tokens):
    pruned(llama, tokens)
    rates = recover(llama, tokens, steps=20, learning_rate=0.01, batch_size=1, **QUIET).steps.learning_rate
    assert list(rates[:3]) == [0.005, 0.01, 0.01]
    assert all(rates.diff()[3:] < 0)
    assert 0 < rates.iloc[-1] < 1e-4
    assert recover(llama, tokens, steps=2, learning_rate=0.01, warmup=0, **QUIET).steps.learning_rate[0] == 0.01
    assert list(recover(llama, tokens, steps=1, learning_rate=0.01, warmup=4, **QUIET).steps.learning_rate) == [0.0025]


def test_flags_and_gradients_are_as_they_were(llama, tokens):
    pruned(llama, tokens)
    llama.train()
    llama.model.layers[1].eval()
    llama.lm_head.weight.requires_grad_(False)
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)  # and yet it is trained
    flags = [module.training for module in llama.modules()], [weight.requires_grad for weight in llama.parameters()]
    before = state(llama)
    llama.model.norm.weight.grad = torch.ones(32)
    llama.model.layers[1].mlp.up_proj.weight.grad = torch.full((48, 32), 1e6)  # stale
    recover(llama, tokens, **BRISK, **QUIET)
    assert flags == (
        [module.training for module in llama.modules()], [weight.requires_grad for weight in llama.parameters()]
    )  # fmt: skip
    assert all(weight.grad is None for weight in llama.parameters())
    fresh = pruned(tiny_llama(), tokens)
    recover(fresh, tokens, **BRISK, **QUIET)
    assert all(torch.equal(weight, state(fresh)[name]) for name, weight in state(llama).items())
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], llama.model.layers[0].mlp.up_proj.weight)


def test_tied_weights_are_trained_once(tokens):
    model = pruned(tiny_llama(tie_word_embeddings=True), tokens)
    recover(model, tokens, **BRISK, train="all", **QUIET)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("moment", ["loss", "weights"])
def test_what_is_not_finite_is_an_error_and_the_weights_are_put_back(llama, tokens, monkeypatch, moment):
    pruned(llama, tokens)
    before, zero, loss = state(llama), masks(llama), F.cross_entropy
    calls = []

    def spoilt(*given):
        calls.append(given)
        return loss(*given) * (math.nan if moment == "loss" and len(calls) == 4 else 1)

    monkeypatch.setattr(recovery.F, "cross_entropy", spoilt)
    # After the last step no loss would tell.
    settings = {"steps": 1, "learning_rate": 1.0} if moment == "weights" else BRISK
    if moment == "weights":
        monkeypatch.setattr(recovery, "_learning_rate", lambda *_: math.inf)
    with pytest.raises(NonFiniteError, match="lower learning_rate"):
        recover(llama, tokens, **settings, **QUIET)
    assert len(calls) == (4 if moment == "loss" else 1)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.named_parameters())
    assert all(torch.equal(mask, zero[name]) for name, mask in masks(llama).items())
    assert all(weight.requires_grad and weight.grad is None for weight in llama.parameters())


@pytest.mark.parametrize(("value", "found"), [(0.0, "0 pruned weights came back and 1 kept"), (0.5, "1 pruned")])
def test_a_mask_that_changes_is_an_error_that_names_the_layer(llama, tokens, value, found):
    pruned(llama, tokens)
    before = state(llama)
    weight = llama.model.layers[2].mlp.up_proj.weight
    row, column = (weight == 0 if value else weight != 0).nonzero()[5].tolist()

    def meddle(done, _):
        if done == 12:
            weight.data[row, column] = value

    with pytest.raises(SparselabError, match=rf"model\.layers\.2\.mlp\.up_proj: .*{found}"):
        recover(llama, tokens, **BRISK, progress=meddle)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.named_parameters())


def test_an_interrupted_run_leaves_a_masked_model(llama, tokens):
    pruned(llama, tokens)
    before, zero = state(llama), masks(llama)

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(llama, tokens, **BRISK, weight_decay=0.1, progress=stop)
    assert all(torch.equal(mask, zero[name]) for name, mask in masks(llama).items())
    assert not torch.equal(before["model.layers.2.mlp.up_proj.weight"], llama.model.layers[2].mlp.up_proj.weight)
    assert all(weight.isfinite().all() and weight.requires_grad for weight in llama.parameters())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, received 0"),
        ({"steps": 2.5}, TypeError, "steps: expected a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0"),
        ({"warmup": -1}, ValueError, "warmup: expected at least 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a number above 0, at most 1, received 0.0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate: expected"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a number from 0 to 1"),
        ({"train": "biases"}, ValueError, "train: expected one of pruned layers, all, received 'biases'"),
        ({"tokens": torch.full((2, 4), 300)}, ValueError, "ids from 0 to 299"),
        ({"tokens": torch.zeros(2, 1, dtype=torch.long)}, ValueError, "windows of at least 2 tokens"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_arguments_change_nothing(llama, tokens, arguments, kind, message):
    pruned(llama, tokens)
    before = state(llama)
    with pytest.raises(kind, match=message):
        recover(llama, **{"tokens": tokens} | arguments, **QUIET)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.named_parameters())


def test_models_that_cannot_be_recovered(llama, tokens):
    with pytest.raises(ValueError, match="nothing is pruned: call prune first"):
        recover(llama, tokens, **QUIET)
    pruned(llama, tokens)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"expected weights in float32, received {dtype} in model.layers.0"):
            recover(pruned(tiny_llama(), tokens).to(dtype), tokens, **QUIET)
    with torch.inference_mode():
        inside = pruned(tiny_llama(), tokens.clone())
    with pytest.raises(ValueError, match=r"load it outside of torch\.inference_mode"):
        recover(inside, tokens, **QUIET)


def test_half_precision_of_what_is_not_trained_is_no_matter(llama, tokens):
    pruned(llama, tokens)
    llama.lm_head.register_parameter("note", nn.Parameter(torch.ones(2, dtype=torch.float16)))
    recover(llama, tokens, steps=1, **QUIET)
    with pytest.raises(ValueError, match=r"received torch.float16 in lm_head\.note"):
        recover(llama, tokens, steps=1, train="all", **QUIET)


@pytest.mark.usefixtures("untyped")
def test_a_streamed_model_is_refused(llama, tokens, tmp_path):
    from sparselab.models.checkpoint import Checkpoint

    pruned(llama, tokens).save_pretrained(tmp_path)
    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), None)
    with pytest.raises(UnsupportedModelError, match="whose weights are all in memory"):
        recover(streamed, tokens, **QUIET)


def test_a_tokens_own_inference_mode_does_not_matter(llama, tokens):
    pruned(llama, tokens)
    with torch.inference_mode():
        inside = tokens.clone()
        recover(llama, inside, **BRISK, train="all", **QUIET)
    assert not any(weight.is_inference() for weight in llama.parameters())


@pytest.mark.slow
def test_recovery_helps_the_bundled_model(bundled):
    from sparselab import calibration_tokens, perplexity

    model, tokenizer, _, held_out = bundled
    before = state(model)
    prune(model, None, "magnitude", "70%", **QUIET)
    lost = float(perplexity(model, held_out[:40], progress=False))
    recover(model, calibration_tokens(tokenizer, nsamples=80, seqlen=128), steps=20, batch_size=4, **QUIET)
    won = float(perplexity(model, held_out[:40], progress=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name])
    assert won < 0.8 * lost
