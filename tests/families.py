"""A tiny random model of each family that the README names."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHAPE: dict[str, object] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {
    "vocab_size": 300, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"sliding_window": 8}
_GEMMA = _SHAPE | _WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _SHAPE),
    "mistral": ("mistral", _SHAPE | _WINDOW),
    "qwen2": ("qwen2", _SHAPE),
    "qwen3": ("qwen3", _SHAPE | {"head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", _SHAPE),
    "opt": ("opt", _OPT),
    "opt-projected": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _SHAPE),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "bloom": ("bloom", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "stablelm": ("stablelm", _SHAPE),
    "olmo2": ("olmo2", _SHAPE),
    "starcoder2": ("starcoder2", _SHAPE | _WINDOW),
    "cohere": ("cohere", _SHAPE),
    "granite": ("granite", _SHAPE),
    "mixtral": ("mixtral", _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _SHAPE | _EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", _SHAPE | _EXPERTS | {"head_dim": 8}),
    "gpt_oss": (
        "gpt_oss",
        _SHAPE | _WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    ),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def tiny(family: str) -> PreTrainedModel:
    """The same model at every call."""
    kind, shape = FAMILIES[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32).eval()
