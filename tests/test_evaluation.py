import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama

from sparselab import bits_per_byte, evaluation, perplexity, prune
from sparselab.errors import NonFiniteError, UnsupportedModelError
from sparselab.models.blocks import Call, Decoder
from sparselab.models.checkpoint import Checkpoint
from sparselab.models.streamed import StreamedModel


def plain(model, tokens):
    """Window losses by the model's own forward."""
    with torch.no_grad():
        logits = model(tokens).logits.double()
    return torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, tokens, strict=True)])


def test_equals_the_models_own_loss(model, tokens):
    result = perplexity(model, tokens)
    expected = plain(model, tokens)
    torch.testing.assert_close(result.nll, expected, rtol=1e-6, atol=0)
    assert float(result) == pytest.approx(math.exp(expected.mean()))
    with torch.no_grad():
        assert float(result.nll[0]) == pytest.approx(float(model(tokens[:1], labels=tokens[:1]).loss), rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 700, 2**25])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_pieces_and_batches_do_not_matter(llama, tokens, monkeypatch, at_once, batch_size):
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", at_once)
    torch.testing.assert_close(perplexity(llama, tokens, batch_size).nll, plain(llama, tokens), rtol=1e-6, atol=0)


def test_logits_stay_within_bounds(monkeypatch, tokens):
    model = tiny_llama(vocab_size=3000)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 30_000)
    sizes = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
    perplexity(model, tokens, batch_size=2)
    assert max(sizes) <= 30_000


def test_standard_error(llama, tokens):
    result = perplexity(llama, tokens)
    spread = result.nll.std(correction=1) / math.sqrt(len(tokens))
    assert result.stderr == pytest.approx(float(result) * float(spread))
    assert str(result) == f"{float(result):.2f} ± {result.stderr:.2f}"
    assert math.isnan(perplexity(llama, tokens[:1]).stderr)


def test_the_model_does_not_change(llama, tokens):
    llama.train()
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    perplexity(llama, tokens)
    assert llama.training
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_half_precision(llama, tokens):
    assert float(perplexity(llama.bfloat16(), tokens)) == pytest.approx(
        float(perplexity(llama.float(), tokens)), rel=0.01
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_block_is_named(llama, tokens, value):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"that of model\.layers\.1;"):
        perplexity(llama, tokens)


def test_a_bad_embedding_or_head_is_named(llama, tokens):
    with torch.no_grad():
        llama.lm_head.weight[:] = math.nan
        with pytest.raises(NonFiniteError, match="the final norm or the head"):
            perplexity(llama, tokens)
        llama.model.embed_tokens.weight[:] = math.nan
        with pytest.raises(NonFiniteError, match="that of the embedding"):
            perplexity(llama, tokens)


def test_bad_tokens(llama):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(llama, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="ids from 0 to 299"):
        perplexity(llama, torch.full((1, 4), 999))


@pytest.mark.usefixtures("untyped")
def test_bits_per_byte_of_other_windows_is_refused(llama, tokens, tokenizer):
    ppl = perplexity(llama, tokens)
    for other in (tokens[:2], tokens[:, :7], tokens[0]):
        with pytest.raises(ValueError, match="tokens: expected the 10 windows of 24 tokens"):
            bits_per_byte(ppl, other, tokenizer)
    with pytest.raises(TypeError, match="expected token windows, received NoneType"):
        bits_per_byte(ppl, None, tokenizer)
    with pytest.raises(TypeError, match="ppl: expected what perplexity gives, received float"):
        bits_per_byte(12.5, tokens, tokenizer)
    silent = evaluation.Perplexity(torch.ones(1, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="tokens that stand for none"):
        bits_per_byte(silent, torch.zeros(1, 2, dtype=torch.long), Silent())


class Silent:
    """A tokenizer whose tokens are all without text."""

    def batch_decode(self, rows):
        return [""] * len(rows)


def test_bits_per_byte_by_hand(tokenizer):
    tokens = torch.tensor([tokenizer("def f(x): return x")["input_ids"]])
    uniform = evaluation.Perplexity(torch.tensor([math.log(8)], dtype=torch.float64), tokens.shape[1])
    predicted = len(b"def f(x): return x")
    assert bits_per_byte(uniform, tokens, tokenizer) == pytest.approx(3 * (tokens.shape[1] - 1) / predicted)


@pytest.mark.parametrize("opened", ["whole", "streamed"])
def test_a_replay_that_is_not_the_models_own_forward_stops_the_run(tmp_path, tokens, monkeypatch, opened):
    """As if a new version of transformers asked something of its blocks that a replay leaves out."""
    model = tiny_llama(initializer_range=0.5)  # so that positions matter
    model.save_pretrained(tmp_path)
    checkpoint = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"))
    decoder = Decoder(model if opened == "whole" else checkpoint)
    evaluation.check_replay(decoder, tokens[:1])
    own = Decoder.run_block

    def without_positions(self, index, hidden, call):
        cos, sin = call.kwargs["position_embeddings"]
        still = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        return own(self, index, hidden, Call(call.args, call.kwargs | still))

    monkeypatch.setattr(Decoder, "run_block", without_positions)
    with pytest.raises(
        UnsupportedModelError, match=r"the same loss of one window .* received \d\.\d+ and \d\.\d+ nats"
    ):
        evaluation.check_replay(decoder, tokens[:1])


def test_a_run_begins_with_that_check(llama, tokens, monkeypatch):
    monkeypatch.setattr(evaluation, "_SAME_LOSS", -1.0)
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="use one that is tested, see"):
        prune(llama, tokens, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
