import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sparselab.errors import UnsupportedModelError
from sparselab.models.blocks import Call, Decoder, evaluating, find_linears, read_weight, write_weight


def replayed(model, tokens) -> torch.Tensor:
    decoder = Decoder(model)
    with evaluating(model):
        hidden, calls = decoder.embed(tokens)
        for index, call in enumerate(calls):
            hidden = decoder.run_block(index, hidden, call)
        return decoder.head(hidden)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def test_replay_equals_the_models_own_forward(model, tokens):
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.equal(replayed(model, tokens), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_replay_whatever_the_attention(llama, tokens, attention):
    llama.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.equal(replayed(llama, tokens), llama(tokens).logits)


def test_head_in_pieces_is_the_head(model, tokens):
    decoder = Decoder(model)
    hidden = torch.randn(2, 24, 32)
    with evaluating(model):
        pieces = [decoder.head(hidden[:, :7]), decoder.head(hidden[:, 7:])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), decoder.head(hidden))


def test_the_model_is_left_as_it_was(model, tokens):
    model.train()
    model.base_model.eval()
    flags = [module.training for module in model.modules()]
    cache = model.config.use_cache
    replayed(model, tokens)
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache == cache
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_are_put_back_after_an_error(llama):
    with pytest.raises(IndexError), evaluating(llama):
        Decoder(llama).embed(torch.tensor([[10_000]]))
    assert not any("forward" in block.__dict__ for block in llama.model.layers)


def test_linears_by_name(model):
    names = list(Decoder(model).linears())
    assert len(names) == len(set(names)) == 3 * (7 if model.config.model_type == "llama" else 6)
    assert not any("lm_head" in name or "embed" in name or "project" in name for name in names)
    assert all(model.get_submodule(name).weight.ndim == 2 for name in names)


def test_conv1d_is_read_and_written_as_d_out_d_in(tokens):
    model = gpt2()
    linear = find_linears(model.transformer.h[0])["attn.c_attn"]
    assert read_weight(linear).shape == (96, 32)
    with torch.no_grad():
        torch.testing.assert_close(linear(torch.eye(32)) - linear.bias, read_weight(linear).T)
    changed = read_weight(linear) * 2
    write_weight(linear, changed)
    assert torch.equal(linear.weight, changed.T)
    with torch.no_grad():
        assert torch.equal(replayed(model.eval(), tokens), model(tokens).logits)


def test_writing_keeps_dtype_and_the_parameter_itself(llama):
    linear = llama.bfloat16().model.layers[0].mlp.up_proj
    parameter = linear.weight
    write_weight(linear, torch.full(parameter.shape, 1 / 3))
    assert linear.weight is parameter
    assert parameter.dtype == torch.bfloat16
    assert parameter.requires_grad


@pytest.mark.parametrize(
    "model",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        lambda: BertModel(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
        lambda: torch.nn.Identity(),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_other_models_are_refused_by_name(model):
    model = model()
    with pytest.raises((UnsupportedModelError, TypeError), match=type(model).__name__):
        Decoder(model)


SHAPE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BertLMHeadModel(BertConfig(**SHAPE, **HEADS, is_decoder=True)), r"BertEncoder\.forward\(\) missing"),
        (lambda: RwkvForCausalLM(RwkvConfig(**SHAPE, attention_hidden_size=32)), "not enough values to unpack"),
    ],
)
def test_a_model_that_the_replay_does_not_fit_is_refused_with_the_reason(model, reason, tokens):
    decoder = Decoder(model())
    decoder.check_prunable()
    with pytest.raises(UnsupportedModelError, match=reason), evaluating(decoder.model):
        decoder.embed(tokens)


def test_a_block_that_cannot_be_called_is_refused_with_the_reason(llama, tokens):
    decoder = Decoder(llama)
    with evaluating(llama):
        hidden, calls = decoder.embed(tokens)
        with pytest.raises(UnsupportedModelError, match=r"model\.layers, .* TypeError: cannot unpack"):
            decoder.run_block(0, hidden, Call((), calls[0].kwargs | {"position_embeddings": None}))


def test_a_missing_length_is_no_length(llama):
    llama.config.max_position_embeddings = -1  # XLNet
    assert Decoder(llama).positions is None


def test_convolutions_and_flat_vectors_in_blocks_are_not_taken_for_experts():
    Decoder(Mamba2ForCausalLM(Mamba2Config(**SHAPE, num_heads=8, head_dim=8, n_groups=1))).check_prunable()
    Decoder(gpt2()).check_prunable()


def test_a_model_that_skips_blocks_is_refused(llama, tokens):
    llama.model.config.num_hidden_layers = 3
    original = llama.model.forward

    def two_blocks(*args, **kwargs):
        kept, llama.model.layers = llama.model.layers, llama.model.layers[:2]
        try:
            return original(*args, **kwargs)
        finally:
            llama.model.layers = kept

    decoder = Decoder(llama)
    llama.model.forward = two_blocks
    with (
        pytest.raises(UnsupportedModelError, match=r"each of the 3 blocks in model\.layers, received 2"),
        evaluating(llama),
    ):
        decoder.embed(tokens)
