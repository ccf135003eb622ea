"""Text to token windows: the standard library of the running interpreter, local files, lists of strings."""

import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]
Dataset = str | Path | Sequence[str]

# Left out of the `stdlib` corpus so that it is the same everywhere: what some distributions do not install (tests,
# Tk, IDLE), what newer Pythons removed as a whole, tables written by programs, and packages that are not the library.
_NOT_EVERYWHERE = {
    *("test", "tests", "idlelib", "idle_test", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("encodings", "pydoc_data", "__phello__", "lib-dynload", "site-packages", "dist-packages"),
}
_HELDOUT_ONE_IN = 8


def is_heldout(module: str) -> bool:
    """Whether a top-level standard-library module (`"json"`, `"textwrap"`) is held out of training and calibration.

    The choice is by a hash of the name, so it is the same on every Python version. Whole packages are held out, not
    single files: the files of a package are too alike for one half to be a fair test of the other.
    """
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELDOUT_ONE_IN == 0


def stdlib_files(split: Split) -> list[Path]:
    """Source files of the interpreter's standard library on one side of the held-out split, in a fixed mixed order.

    The order is by a hash of the path inside the library, so that the first windows of the text are a fair sample of
    modules rather than those that begin with the letter a.

    Raises:
        ValueError: split is neither "train" nor "heldout".
        FileNotFoundError: this Python carries no library sources.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', received {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    chosen = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        top = inside.parts[0].removesuffix(".py")
        generated = top.startswith(("_sysconfigdata", "config-"))
        if generated or not _NOT_EVERYWHERE.isdisjoint([top, *inside.parts]):
            continue
        if is_heldout(top) == (split == "heldout"):
            chosen.append((hashlib.sha256(inside.as_posix().encode()).digest(), path))
    if not chosen:
        raise FileNotFoundError(f"no Python sources under {root}: dataset 'stdlib' needs a Python with its library")
    return [path for _, path in sorted(chosen)]


def documents(dataset: Dataset, split: Split = "train") -> list[str]:
    """The texts of a dataset, one string a document.

    Args:
        dataset: "stdlib"; the path of a UTF-8 text file (one document) or of a folder of them (one each, in path
            order, hidden files skipped); or a list of strings (one each).
        split: which side of the held-out split; only "stdlib" has one.

    Raises:
        ValueError: the name is neither "stdlib" nor an existing path, or a file is not UTF-8 text.
    """
    if not isinstance(dataset, str | Path):
        return _checked_strings(dataset)
    if dataset == "stdlib":
        return [_read_text(path) for path in stdlib_files(split)]
    path = _existing(dataset)
    if path.is_file():
        return [_read_text(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [_read_text(file) for file in files if not file.name.startswith(".")]


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset = "stdlib",
    nsamples: int = 128,
    seqlen: int = 256,
    seed: int = 0,
) -> Int[Tensor, "nsamples seqlen"]:
    """Draw calibration windows: the text is cut into windows that do not overlap, which are shuffled with the seed.

    The first n windows of a larger draw with the same seed are the draw of n windows, so studies of calibration size
    compare nested samples.

    Args:
        tokenizer: its own special tokens are added once per document.
        dataset: see `documents`; "stdlib" is read on its training side.
        nsamples: number of windows.
        seqlen: tokens a window.
        seed: of the shuffle.

    Raises:
        ValueError: a count is not positive, the dataset is unknown, or the text is too short.
    """
    windows = all_windows(tokenizer, dataset, "train", seqlen, needed=_positive("nsamples", nsamples))
    return draw(windows, nsamples, seed)


def draw(windows: Int[Tensor, "windows seqlen"], nsamples: int, seed: int) -> Int[Tensor, "nsamples seqlen"]:
    """The draw of `calibration_tokens` from windows that are at hand already.

    Raises:
        ValueError: there are fewer windows, or the seed is negative or none.
    """
    if seed is None or seed < 0:  # Python draws the same for -1 and 1, and anew each time for None
        raise ValueError(f"seed: expected a whole number from 0, received {seed}")
    if nsamples > len(windows):
        raise ValueError(f"nsamples: expected at most the {len(windows)} windows there are, received {nsamples}")
    order = list(range(len(windows)))
    random.Random(seed).shuffle(order)
    return windows[order[:nsamples]]


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset = "stdlib",
    nsamples: int | None = None,
    seqlen: int = 256,
) -> Int[Tensor, "nsamples seqlen"]:
    """The first windows of the text in order, not overlapping, remainder dropped: the papers' protocol.

    Args:
        tokenizer: its own special tokens are added once per document.
        dataset: see `documents`; "stdlib" is read on its held-out side.
        nsamples: number of windows; None takes all there are.
        seqlen: tokens a window.

    Raises:
        ValueError: a count is not positive, the dataset is unknown, or the text is too short.
    Source: Frantar & Alistarh 2023, section 4; the evaluation of the published code.
    """
    needed = 1 if nsamples is None else _positive("nsamples", nsamples)
    return all_windows(tokenizer, dataset, "heldout", seqlen, needed)[:nsamples]


def all_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: Split, seqlen: int, needed: int = 1
) -> Int[Tensor, "windows seqlen"]:
    """A whole text cut into windows that do not overlap, in order, remainder dropped.

    Args:
        tokenizer, dataset, seqlen: see `calibration_tokens`.
        split: see `documents`.
        needed: how many windows there have to be at least.

    Raises:
        ValueError: seqlen is not positive, the dataset is unknown, or the text is too short.
    """
    _positive("seqlen", seqlen)
    stream = token_stream(tokenizer, documents(dataset, split))
    count = len(stream) // seqlen
    if count < needed:
        raise ValueError(
            f"too little text in {describe(dataset)}: {needed} windows of {seqlen} tokens need {needed * seqlen}, "
            f"found {len(stream)}; lower nsamples or seqlen, or give more text"
        )
    return stream[: count * seqlen].view(count, seqlen)


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """All documents tokenised, one after another, as one row of token ids."""
    if not texts:
        return torch.empty(0, dtype=torch.long)
    ids = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor(row, dtype=torch.long) for row in ids])


def describe(dataset: Dataset) -> str:
    """The dataset's name as tables and figures state it."""
    if isinstance(dataset, str | Path):
        return dataset if dataset == "stdlib" else Path(dataset).name
    return f"{len(dataset)} given texts"


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, received {value}")
    return value


def _existing(dataset: str | Path) -> Path:
    path = Path(dataset)
    try:
        exists = dataset != "" and path.exists()  # Path("") would be the current folder
    except OSError:  # a text given in place of a name is too long to be one
        exists = False
    if not exists:
        name = textwrap.shorten(str(dataset), 100)
        raise ValueError(f"dataset {name!r}: expected 'stdlib', an existing text file or folder, or a list of strings")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, received bytes that are not ({error.reason})") from error


def _checked_strings(texts: Sequence[str]) -> list[str]:
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(
            f"dataset: expected a name, a path or a list of strings, received a {type(wrong).__name__} in it"
        )
    return list(texts)
