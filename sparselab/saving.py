"""A saved model is opened again and held against the one at hand: same weights, same zeros, same logits."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.errors import OutputError
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.checkpoint import Checkpoint
from sparselab.models.inputs import check_tokens
from sparselab.models.streamed import StreamedModel

_TOKENS = 128  # of the window that logits are compared on; more show no more
_SAME_LOGITS = 1e-3  # of the largest; in half precision one rounding, if that is more


def check_saved(model: PreTrainedModel, folder: str | Path, tokens: Int[Tensor, "n seqlen"] | None = None) -> None:
    """Raise unless a saved model, opened again, is the model at hand.

    For models that were pruned in memory and saved by `save_pretrained`; `prune_checkpoint` checks what it writes.

    Args:
        model: in memory; not changed.
        folder: where it was saved; read block by block.
        tokens: windows, of which the first is looked at; None takes token ids in order.

    Raises:
        OutputError: a weight is missing, has other values or zeros, or the logits differ; names the first.
        ModelLoadError: the folder cannot be read as a model.
        UnsupportedModelError: the model is not all in memory.
        ValueError: tokens do not fit the model.
    """
    decoder = Decoder(model)
    decoder.check_whole()
    window = window_to_check(decoder, tokens)
    saved, at_hand = open_again(model, Path(folder), decoder.device), model.state_dict()
    for name, weight in saved.read(saved.absent):
        _check_weight(f"{folder}: {name}", at_hand[name], weight)
    with evaluating(model):
        check_logits(folder, decoder.forward(window), saved, window)


def open_again(model: PreTrainedModel, folder: Path, device: torch.device) -> StreamedModel:
    """A folder that a model of this class and dtype was saved to, streamed.

    Raises:
        OutputError: its weights are not those that its configuration asks for.
        ModelLoadError: see `Checkpoint`.
    """
    trusted = type(model).__module__.startswith("transformers_modules")  # its own code was run to make it
    saved = StreamedModel(Checkpoint(folder), device, model.dtype, trusted)
    if any(saved.misfit):
        kind, names = next((kind, found) for kind, found in saved.misfit._asdict().items() if found)
        raise OutputError(f"{folder}: opened again, it has {kind} weights, first {names[0]}; {_REMEDY}")
    return saved


def window_to_check(decoder: Decoder, tokens: Int[Tensor, "n seqlen"] | None) -> Int[Tensor, "1 seqlen"]:
    """A few tokens that fit the model: the first of the given ones, or ids in order."""
    if tokens is None:
        return torch.arange(min(_TOKENS // 4, decoder.vocab_size))[None]
    return check_tokens(decoder, tokens)[:1, :_TOKENS]


def check_logits(
    folder: str | Path, expected: Float[Tensor, "1 seqlen vocab"], saved: StreamedModel, window: Int[Tensor, "1 seqlen"]
) -> None:
    """Raise OutputError unless the saved model's own forward gives the logits that are expected of it."""
    with evaluating(saved.model):
        received = Decoder(saved).forward(window)
    expected = expected.to(received.device)
    scale = float(expected[expected.isfinite()].abs().max())
    enough = max(_SAME_LOGITS, torch.finfo(received.dtype).eps) * scale
    if not torch.allclose(received, expected, rtol=0, atol=enough, equal_nan=True):
        worst = float((received - expected).abs().max())
        raise OutputError(
            f"{folder}: opened again, the model was expected to give the same logits, received some that differ by up "
            f"to {worst:.3g} (the largest is {scale:.3g}); {_REMEDY}"
        )


def _check_weight(where: str, expected: Tensor, received: Tensor) -> None:
    if received.shape == expected.shape and torch.equal(received, expected):
        return
    zeros = (
        f"{int(((received == 0) != (expected == 0)).sum())} zeros elsewhere"
        if received.shape == expected.shape
        else f"shape {tuple(received.shape)} for {tuple(expected.shape)}"
    )
    raise OutputError(f"{where}: expected the weights of the model at hand, received others ({zeros}); {_REMEDY}")


_REMEDY = "save it again, and if that does not help, by another version of transformers"
