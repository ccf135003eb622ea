"""Perplexity by the papers' protocol, with its uncertainty. Nothing here changes a model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab.calibration import advance_streams, enter
from sparselab.errors import NonFiniteError, UnsupportedModelError
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.inputs import as_windows, batches, check_tokens
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress, tracked

# Logits held at a time, in elements: 128 MiB in float32, whatever the size of the vocabulary.
_LOGITS_AT_ONCE = 2**25
_SAME_LOSS = 1e-3  # relative


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token; `float(ppl)` gives the number.

    Args:
        nll: mean negative log-likelihood per predicted token of each window, in nats, float64 on the CPU.
        seqlen: tokens a window; each predicts seqlen − 1 of them.
    """

    nll: Float[Tensor, " windows"]
    seqlen: int

    def __float__(self) -> float:
        return math.exp(self.nll.mean().item())

    def __str__(self) -> str:
        return f"{float(self):.2f} ± {self.stderr:.2f}"

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity over windows (delta method); NaN for a single window."""
        if len(self.nll) < 2:
            return math.nan
        return float(self) * self.nll.std().item() / math.sqrt(len(self.nll))


def perplexity(
    model: PreTrainedModel | StreamedModel,
    tokens: Int[Tensor, "windows seqlen"],
    batch_size: int | None = None,
    progress: Progress = True,
    *,
    spill: Path | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on windows of tokens.

    Each window is a context of its own; its first token predicts and is not predicted. The model is run by its own
    code; only the projection to the vocabulary is cut into pieces, so that memory does not grow with the vocabulary.

    Args:
        model: a `transformers` causal language model, on any device; or one from `stream`, each block of which is then
            read once. All processes of a partitioned model have to make this call alike.
        tokens: from `evaluation_tokens`, or any LongTensor of ids.
        batch_size: windows at a time; None chooses by the device.
        progress: a bar over blocks; see `sparselab.progress`.
        spill: an empty folder for the hidden states of a streamed model; None keeps them in memory.

    Raises:
        ValueError: tokens are not windows the model can take.
        NonFiniteError: a loss is NaN or infinite; names the first block that sends on such values.
    Source: Frantar & Alistarh 2023, section 4, and the published evaluation code.
    """
    decoder = Decoder(model)
    tokens = check_tokens(decoder, tokens)
    if tokens.shape[1] < 2:
        raise ValueError("tokens: expected windows of at least 2 tokens, since the first is not predicted")
    losses = []
    # A batch goes through the whole model before the next one, unless each block has to be fetched first.
    rounds = [tokens] if not decoder.residence.whole else list(batches(tokens, batch_size, decoder.device))
    with (
        evaluating(decoder.model),
        tracked(progress, len(rounds) * len(decoder.blocks), "perplexity", "block") as advance,
    ):
        for windows in rounds:
            losses.append(_losses(decoder, windows, batch_size, spill, advance))
            if (bad := ~losses[-1].isfinite()).any():
                raise NonFiniteError(f"perplexity: the loss is not finite; {_first_bad_block(decoder, windows[bad])}")
    return Perplexity(torch.cat(losses), tokens.shape[1])


def check_replay(decoder: Decoder, window: Int[Tensor, "1 seqlen"]) -> None:
    """Look whether replaying a model's blocks one by one gives what the model's own forward gives.

    A version of transformers that calls its blocks otherwise than this package replays them would spoil everything
    that follows: statistics, layer errors and perplexities.

    Args:
        decoder: the model, dense; each block is fetched twice.
        window: of tokens.

    Raises:
        UnsupportedModelError: the two losses differ by more than a thousandth.
    """
    if window.shape[1] < 2:
        return
    with evaluating(decoder.model):
        replayed = float(_losses(decoder, window, 1, None, lambda _: None))
        logits = decoder.forward(window)
        own = float(_losses_in_pieces(lambda part: logits[:, part], window, logits.shape[2], logits.device))
    if math.isfinite(own) and not abs(own - replayed) <= _SAME_LOSS * max(own, 1):
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__}: expected the same loss of one window by the model's own forward and by "
            f"replaying its blocks, received {own:.4f} and {replayed:.4f} nats a token (perplexities "
            f"{math.exp(own):.2f} and {math.exp(replayed):.2f}); this version of transformers "
            f"({version('transformers')}) may call its blocks in a new way: use one that is tested, see constraints.txt"
        )


def bits_per_byte(ppl: Perplexity, tokens: Int[Tensor, "windows seqlen"], tokenizer: PreTrainedTokenizerBase) -> float:
    """The same loss per byte of text, in bits: comparable between vocabularies, as perplexity is not.

    Args:
        ppl: from `perplexity`.
        tokens: the very windows that it was measured on.
        tokenizer: the model's.

    Raises:
        ValueError: other windows than those of the perplexity, or windows without text.
        TypeError: not a perplexity, or no windows.
    """
    if not isinstance(ppl, Perplexity):
        raise TypeError(f"ppl: expected what perplexity gives, received {type(ppl).__name__}")
    windows = as_windows(tokens)
    if windows.shape != (len(ppl.nll), ppl.seqlen):
        raise ValueError(
            f"tokens: expected the {len(ppl.nll)} windows of {ppl.seqlen} tokens that the perplexity was measured on, "
            f"received shape {tuple(windows.shape)}"
        )
    predicted = sum(len(text.encode()) for text in tokenizer.batch_decode(windows[:, 1:].tolist()))
    if not predicted:
        raise ValueError("tokens: expected windows of text, received tokens that stand for none")
    nats = ppl.nll.sum().item() * (ppl.seqlen - 1)
    return nats / math.log(2) / predicted


def _losses(
    decoder: Decoder,
    windows: Int[Tensor, "n seqlen"],
    batch_size: int | None,
    spill: Path | None,
    advance: Callable[[int], object],
) -> Float[Tensor, " n"]:
    """The loss of each window, on the CPU; all of them pass a block before the next is looked at."""
    streams = enter(decoder, windows, batch_size, spill)
    parts = batches(windows, batch_size, decoder.device)
    for index in range(len(decoder.blocks)):
        with decoder.block(index):
            advance_streams(decoder, index, streams)
        advance(1)
    with decoder.outside():
        losses = [_head_losses(decoder, stream.hidden, b) for stream, b in zip(streams, parts, strict=True)]
    return torch.cat(losses).cpu()


def _head_losses(
    decoder: Decoder, hidden: Float[Tensor, "batch seq hidden"], batch: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    return _losses_in_pieces(lambda part: decoder.head(hidden[:, part]), batch, decoder.vocab_size, hidden.device)


def _losses_in_pieces(
    logits_at: Callable[[slice], Float[Tensor, "batch piece vocab"]],
    batch: Int[Tensor, "batch seq"],
    vocab_size: int,
    device: torch.device,
) -> Float[Tensor, " batch"]:
    """The loss of each window, from the logits of a few positions at a time."""
    targets = batch[:, 1:].to(device)
    step = max(1, _LOGITS_AT_ONCE // (len(batch) * vocab_size))
    total = torch.zeros(len(batch), dtype=torch.float64, device=device)
    for start in range(0, targets.shape[1], step):
        piece = targets[:, start : start + step]
        # The head, or accelerate after it, may be on another device than the last block.
        logits = logits_at(slice(start, start + piece.shape[1])).to(device)
        each = F.cross_entropy(logits.flatten(0, 1).float(), piece.flatten(), reduction="none")
        total += each.view_as(piece).double().sum(dim=1)
    return total / targets.shape[1]


def _first_bad_block(decoder: Decoder, batch: Int[Tensor, "batch seq"]) -> str:
    streams = enter(decoder, batch[:1], 1)
    names = ["the embedding", *(f"{decoder.blocks_name}.{index}" for index in range(len(decoder.blocks)))]
    for index, name in enumerate(names):
        if not streams[0].hidden.isfinite().all():
            return f"the first output that is not finite is that of {name}; look at its weights"
        if index < len(decoder.blocks):
            with decoder.block(index):
                advance_streams(decoder, index, streams)
    return "all blocks send on finite values, so it is the final norm or the head"
