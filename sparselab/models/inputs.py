"""Token windows on their way into a model: every accepted form made one, checked, and cut into batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparselab.models.blocks import Decoder
from sparselab.solvers.checks import check_whole

# Tokens of one forward pass. Small batches keep a block's activations in the CPU's caches; a GPU wants more work.
_CPU_TOKENS, _GPU_TOKENS = 1024, 16384


def as_windows(calib_data: Any) -> Int[Tensor, "n seqlen"]:
    """One LongTensor of token windows from any form in which calibration data comes.

    Args:
        calib_data: a LongTensor [n, seqlen]; or an iterable (list, DataLoader) of rows [seqlen] or batches
            [b, seqlen], each a tensor or list of ids, a dict with "input_ids", or an `(input, target)` pair as the
            reference repository has them.

    Raises:
        ValueError: there are no windows, they are not of one length, or not of whole numbers.
        TypeError: an element is none of these.
    """
    if isinstance(calib_data, Tensor):
        rows = [calib_data]
    elif isinstance(calib_data, Iterable) and not isinstance(calib_data, str | bytes):
        rows = [_element(element) for element in calib_data]
    else:
        raise TypeError(f"calibration data: expected token windows, received {type(calib_data).__name__}")
    rows = [row[None] if row.ndim == 1 else row for row in rows]
    if not rows or sum(row.numel() for row in rows) == 0:
        raise ValueError("calibration data: expected at least one window of tokens, received none")
    lengths = sorted({row.shape[-1] for row in rows})
    if len(lengths) > 1 or any(row.ndim != 2 for row in rows):
        raise ValueError(f"calibration data: expected windows of one length, received lengths {lengths}")
    windows = torch.cat(rows)
    if windows.is_floating_point() or windows.dtype == torch.bool:
        raise ValueError(f"calibration data: expected whole numbers, received {windows.dtype}")
    return windows.long()


def check_tokens(decoder: Decoder, tokens: Any) -> Int[Tensor, "n seqlen"]:
    """Token windows that the model can take, or a `ValueError` that says why not."""
    windows = as_windows(tokens)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= decoder.vocab_size:
        raise ValueError(
            f"tokens: expected ids from 0 to {decoder.vocab_size - 1}, received {low} to {high}; "
            "is it this model's tokenizer?"
        )
    if decoder.positions is not None and windows.shape[1] > decoder.positions:
        raise ValueError(f"seqlen: the model has {decoder.positions} positions, received windows of {windows.shape[1]}")
    return windows


def batches(
    tokens: Int[Tensor, "n seqlen"], batch_size: int | None, device: torch.device
) -> Iterator[Int[Tensor, "batch seqlen"]]:
    """Consecutive batches of windows; `batch_size` None takes as many as suit the device."""
    if batch_size is None:
        at_once = _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS
        batch_size = max(1, at_once // tokens.shape[1])
    check_whole("batch_size", batch_size, 1)
    yield from tokens.split(int(batch_size))


def _element(element: Any) -> Tensor:
    if isinstance(element, dict) or hasattr(element, "input_ids"):
        element = element["input_ids"]
    elif isinstance(element, tuple) or (isinstance(element, list) and element and isinstance(element[0], Tensor)):
        element = element[0]
    if not isinstance(element, Tensor | list):
        raise TypeError(f"calibration data: expected token windows, received an element of {type(element).__name__}")
    return torch.as_tensor(element)
