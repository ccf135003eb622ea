"""The same prompts completed by several models: what people look at first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import corpora, sources
from sparselab.models.blocks import evaluating
from sparselab.models.loading import load


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase,
    dataset: sources.Dataset = "stdlib",
    nsamples: int = 3,
    prompt_tokens: int = 48,
    max_new_tokens: int = 40,
) -> pd.DataFrame:
    """Beginnings of windows that lie evenly over a text which is not calibrated on.

    Args:
        tokenizer: counts the tokens.
        dataset: see `evaluation_tokens`.
        nsamples: prompts.
        prompt_tokens: of each.
        max_new_tokens: of what follows.

    Returns:
        A row each: prompt, text (what really follows).

    Raises:
        ValueError: see `evaluation_tokens`.
    """
    windows = corpora.evaluation_tokens(tokenizer, dataset, None, prompt_tokens + max_new_tokens)
    if not 1 <= nsamples <= len(windows):
        raise ValueError(f"nsamples: expected from 1 to {len(windows)} prompts of this text, received {nsamples}")
    chosen = windows[:: len(windows) // nsamples][:nsamples]
    parts = {"prompt": chosen[:, :prompt_tokens], "text": chosen[:, prompt_tokens:]}
    return pd.DataFrame(
        {name: tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True) for name, ids in parts.items()}
    )


def completions(
    models: Sequence[str | Path],
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    device: str | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """What each model makes of each prompt: always its likeliest token (greedy), so that no chance is in it.

    Args:
        models: names for `load`, the dense one first, say; opened one after the other, so that one is in memory.
        prompts: texts; each model reads them by its own tokenizer.
        max_new_tokens: fewer if a model ends the text.
        device, dtype, trust_remote_code: see `load`.

    Returns:
        A row a prompt: prompt, and a column a model with what it adds.

    Raises:
        ValueError: no models, one that is named twice, no prompts or empty ones.
        ModelLoadError: see `load`.
    """
    names = [str(model) for model in models]
    if not names or len(set(names)) < len(names) or "prompt" in names:
        raise ValueError(f"models: expected different ones, received {', '.join(names) or 'none'}")
    if not prompts or not all(prompts):
        raise ValueError("prompts: expected texts, received none or an empty one")
    table = {"prompt": list(prompts)}
    for name in names:
        model, tokenizer = load(name, device, dtype, trust_remote_code=trust_remote_code)
        with evaluating(model):
            table[name] = [_completion(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
        del model
    return pd.DataFrame(table)


def as_text(table: pd.DataFrame) -> str:
    """Prompts with their completions, one under another: lines of code and of tables stay as they are."""
    parts = []
    for number, row in enumerate(table.to_dict("records"), 1):
        parts.append(f"===== prompt {number} of {len(table)}\n{row.pop('prompt')}")
        parts += [f"----- {name}\n{text}" for name, text in row.items()]
    return "\n".join(parts)


def _completion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    generator: Any = model  # generate comes to the class by way of a mixin
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
