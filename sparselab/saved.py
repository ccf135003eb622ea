"""Whether what was saved is the model that was meant: its folder is opened again, and compared."""

import math
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.calibration import advance_streams, enter
from sparselab.errors import OutputError
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.checkpoint import unlike
from sparselab.models.loading import stream_weights

_SEQLEN = 64


def check_saved(model: PreTrainedModel, folder: str | Path) -> None:
    """Look whether a folder, opened again, is the model that `save_pretrained` wrote to it.

    Every weight is compared bit for bit, so that the same ones are zero, and one window of 64 tokens passes through
    both models by their own forward. Of the folder's model, one block is in memory at a time.

    Args:
        model: as it was when it was saved, wherever its weights are. All processes of a partitioned model have to make
            this call alike.
        folder: what it was saved to; a tokenizer is not needed.

    Raises:
        OutputError: a weight is another, which is named with how many values and zeros differ; or the logits are.
        ModelLoadError: the folder cannot be opened.
        UnsupportedModelError, TypeError: the model is none that sparselab can take apart; see `prune`.
    """
    decoder = Decoder(model)
    again = _opened(decoder, folder)
    if differing := sorted(set(decoder.model.state_dict()) ^ set(again.model.state_dict())):
        raise OutputError(f"{folder}: {differing[0]} is in the model or in the folder, and not in both; save it again")
    with evaluating(decoder.model):
        for index in range(len(decoder.blocks)):
            with decoder.block(index), again.block(index):
                _check_weights(decoder, again, decoder.block_prefix(index), folder)
        with decoder.outside(), again.outside():
            _check_weights(decoder, again, "", folder)
        _check_logits(decoder.forward(_window(decoder)), again, folder)


class Witness:
    """One window on its way through the blocks of a model that is pruned, each as it is when its weights are written.

    Args:
        decoder: the model, before its first block is pruned. All processes of a partitioned model make one.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        with evaluating(decoder.model):
            self._streams = enter(decoder, _window(decoder), 1)

    def follow(self, index: int) -> None:
        """Pass the next block, whose weights are in their places."""
        with evaluating(self._decoder.model):
            advance_streams(self._decoder, index, self._streams)

    def logits(self) -> Float[Tensor, "1 seqlen vocab"]:
        """What the model says in the end; all processes of a partitioned model call this."""
        with evaluating(self._decoder.model), self._decoder.outside():
            return self._decoder.head(self._streams[0].hidden)

    def check(self, logits: Float[Tensor, "1 seqlen vocab"], folder: Path) -> None:
        """Raise OutputError where a folder, opened again, gives other logits by the model's own forward."""
        with evaluating(self._decoder.model):
            _check_logits(logits, _opened(self._decoder, folder), folder)


def _opened(decoder: Decoder, folder: str | Path) -> Decoder:
    """What a folder has, by code that comes with it only if the model is of such code."""
    trusted = type(decoder.model).__module__.startswith("transformers_modules.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* code that comes with this model is run")  # as was said when it was opened
        return Decoder(stream_weights(folder, decoder.device, trust_remote_code=trusted))


def _window(decoder: Decoder) -> Int[Tensor, "1 seqlen"]:
    """Token ids from all over the vocabulary."""
    seqlen = min(_SEQLEN, decoder.positions or _SEQLEN)
    return torch.linspace(0, decoder.vocab_size - 1, seqlen, dtype=torch.float64).long()[None]


def _check_weights(decoder: Decoder, again: Decoder, prefix: str, folder: str | Path) -> None:
    """Compare weights that are in their places: those of a block by its prefix, or without one all in no block."""
    found = again.model.state_dict()
    for name, weight in decoder.model.state_dict().items():
        wanted = name.startswith(prefix) if prefix else decoder.is_outside(name)
        if wanted and (trouble := unlike(weight, found[name])):
            raise OutputError(f"{folder}: {name} is not that of the model: {trouble}; save it again")


def _check_logits(wanted: Float[Tensor, "1 seqlen vocab"], again: Decoder, folder: str | Path) -> None:
    """Compare logits, which rounding alone may part: a GPU adds up in no fixed order."""
    found = again.forward(_window(again)).to(wanted.device)
    if not unlike(wanted, found):
        return
    share = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not share <= math.sqrt(torch.finfo(again.model.dtype).eps):
        raise OutputError(
            f"{folder}: opened again, the model has the weights that were written and gives other logits (relative "
            f"difference {share:.2g}), so its config.json does not say all that the model was; use a version of "
            "transformers that is tested, see constraints.txt"
        )
