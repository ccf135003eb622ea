"""Text to token windows: how it is tokenised, cut and drawn from, as the papers do for their corpora."""

import hashlib
import json
import random
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparselab import files
from sparselab.sources import Dataset, Document, Source, describe, source

Bos = Literal["document", "window"]
_WORTH_KEEPING = 2**20  # characters; what is shorter is tokenised sooner than found
_MOST_KEPT = 32  # texts, about 10 MB each


class CalibrationText:
    """A text to draw calibration windows from, with one seed or another.

    Args:
        tokenizer, dataset, seqlen, bos: see `calibration_tokens`.

    Raises:
        ValueError: seqlen is not positive, the dataset is unknown, or the tokenizer has no begin-of-sequence token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, seqlen: int, bos: Bos = "document"
    ) -> None:
        self._first = _first_token(tokenizer, bos)
        self.seqlen = _positive("seqlen", seqlen - len(self._first))
        self._tokenizer, self._dataset, self._source = tokenizer, dataset, source(dataset, "train")
        self._tokenised: dict[int, Int[Tensor, " tokens"]] = {}

    @cached_property
    def sha256(self) -> str:
        """Of all documents, one after another: another text has another."""
        digest = hashlib.sha256()
        for text in _written(self._source.documents):
            digest.update(_digest(text))
        return digest.hexdigest()

    def draw(self, nsamples: int, seed: int) -> Int[Tensor, "nsamples seqlen"]:
        """Windows: the first n of a larger draw with the same seed are the draw of n windows.

        Raises:
            ValueError: nsamples is not positive, the seed is negative or none, or there is too little text.
        """
        _positive("nsamples", nsamples)
        if seed is None or seed < 0:  # Python draws the same for -1 and 1, and anew each time for None
            raise ValueError(f"seed: expected a whole number from 0, received {seed}")
        return _begun(self._first, self._windows(random.Random(seed), nsamples))

    def _windows(self, rng: random.Random, nsamples: int) -> Int[Tensor, "nsamples seqlen"]:
        if self._source.draws == "crops":
            return torch.stack([self._crop(rng, self._stream) for _ in range(nsamples)])
        if self._source.draws == "documents" and self._any_is_long:
            return torch.stack([self._crop(rng, self._long_document(rng)) for _ in range(nsamples)])
        windows = cut(self._stream, self.seqlen, nsamples, self._dataset)
        order = list(range(len(windows)))
        rng.shuffle(order)
        return windows[order[:nsamples]]

    @cached_property
    def _stream(self) -> Int[Tensor, " tokens"]:
        return token_stream(self._tokenizer, joined(self._source), special=not len(self._first))

    @cached_property
    def _any_is_long(self) -> bool:
        """Without this the papers' search would never end; then documents are packed one after another instead."""
        return any(len(self._tokens_of(index)) > self.seqlen for index in range(len(self._source.documents)))

    def _long_document(self, rng: random.Random) -> Int[Tensor, " tokens"]:
        while True:
            tokens = self._tokens_of(rng.randint(0, len(self._source.documents) - 1))
            if len(tokens) > self.seqlen:
                return tokens

    def _tokens_of(self, index: int) -> Int[Tensor, " tokens"]:
        if index not in self._tokenised:
            document = self._source.documents[index : index + 1]
            self._tokenised[index] = token_stream(self._tokenizer, document, special=not len(self._first))
        return self._tokenised[index]

    def _crop(self, rng: random.Random, tokens: Int[Tensor, " tokens"]) -> Int[Tensor, " seqlen"]:
        if len(tokens) <= self.seqlen:
            raise ValueError(_too_little(self._dataset, 1, self.seqlen, len(tokens)))
        start = rng.randint(0, len(tokens) - self.seqlen - 1)
        return tokens[start : start + self.seqlen]


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset = "stdlib",
    nsamples: int = 128,
    seqlen: int = 256,
    seed: int = 0,
    bos: Bos = "document",
) -> Int[Tensor, "nsamples seqlen"]:
    """Draw calibration windows.

    The text is cut into windows that do not overlap, which are shuffled with the seed. From "wikitext2" and "ptb" they
    are crops at random places, and from "c4" crops of random documents longer than a window, as in the papers; only the
    shard's first 10 000 documents are looked at there.

    The first n windows of a larger draw with the same seed are the draw of n windows, so studies of calibration size
    compare nested samples.

    Args:
        tokenizer: the model's.
        dataset: see `source`; "stdlib" is read on its training side.
        nsamples: number of windows.
        seqlen: tokens a window.
        seed: of the draw.
        bos: where special tokens stand. "document": as the tokenizer puts them, once per document, or once where the
            papers join documents. "window": a begin-of-sequence token opens each window, and the text has none; models
            that have never seen a text without one (Gemma) need this.

    Raises:
        ValueError: a count is not positive, the dataset is unknown, the text is too short, or the tokenizer has no
            begin-of-sequence token.
    Source: Frantar & Alistarh 2023, and the published code's loaders.
    """
    _positive("nsamples", nsamples)
    return CalibrationText(tokenizer, dataset, seqlen, bos).draw(nsamples, seed)


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset = "stdlib",
    nsamples: int | None = None,
    seqlen: int = 256,
    bos: Bos = "document",
) -> Int[Tensor, "nsamples seqlen"]:
    """The first windows of the text in order, not overlapping, remainder dropped: the papers' protocol.

    Args:
        tokenizer: the model's.
        dataset: see `source`; "stdlib" is read on its held-out side.
        nsamples: number of windows; None takes all there are; of "c4" 256 at most, as in the papers.
        seqlen: tokens a window.
        bos: see `calibration_tokens`.

    Raises:
        ValueError: a count is not positive, the dataset is unknown, the text is too short, or the tokenizer has no
            begin-of-sequence token.
    Source: Frantar & Alistarh 2023, section 4; the evaluation of the published code.
    """
    needed, first = 1 if nsamples is None else _positive("nsamples", nsamples), _first_token(tokenizer, bos)
    length, found = _positive("seqlen", seqlen - len(first)), source(dataset, "heldout")
    stream = token_stream(tokenizer, joined(found), special=not len(first))
    windows = cut(stream, length, needed, dataset)[: found.most]
    if needed > len(windows):
        raise ValueError(f"nsamples: expected at most {found.most} windows of {dataset}, received {nsamples}")
    return _begun(first, windows[:nsamples])


def cut(
    stream: Int[Tensor, " tokens"], seqlen: int, needed: int, dataset: Dataset = ()
) -> Int[Tensor, "windows seqlen"]:
    """A whole text cut into windows that do not overlap, in order, remainder dropped.

    Args:
        stream: its tokens.
        seqlen: tokens a window.
        needed: how many windows there have to be at least.
        dataset: where it is from, for messages.

    Raises:
        ValueError: the text is too short.
    """
    count = len(stream) // seqlen
    if count < needed:
        raise ValueError(_too_little(dataset, needed, seqlen, len(stream)))
    return stream[: count * seqlen].view(count, seqlen)


def _first_token(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Int[Tensor, " one_or_none"]:
    """What opens each window."""
    check_bos(bos)
    if bos == "document":
        return torch.empty(0, dtype=torch.long)
    if tokenizer.bos_token_id is None:
        raise ValueError("bos: expected 'document', as the model's tokenizer has no begin-of-sequence token")
    return torch.tensor([tokenizer.bos_token_id])


def _begun(first: Int[Tensor, " one_or_none"], windows: Int[Tensor, "n length"]) -> Int[Tensor, "n seqlen"]:
    return torch.cat([first.expand(len(windows), -1), windows], dim=1) if len(first) else windows


def check_bos(bos: str) -> None:
    """Raise ValueError unless it is a place where begin-of-sequence tokens can stand."""
    if bos not in ("document", "window"):
        raise ValueError(f"bos: expected 'document' or 'window', received {bos!r}")


def joined(found: Source) -> Sequence[Document]:
    """The documents as they are tokenised: one by one, or as one text."""
    return found.documents if found.joiner is None else [found.joiner.join(map(str, found.documents))]


def token_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document], special: bool = True
) -> Int[Tensor, " tokens"]:
    """All documents tokenised, one after another, as one row of token ids.

    Conversations are written out by the tokenizer's chat template, which brings the special tokens itself. The tokens
    of a long text are kept in `files.cache_folder`, by a hash of text and tokenizer, for this run and others.

    Raises:
        ValueError: there are conversations, and the tokenizer has no chat template.
    """
    if not texts:
        return torch.empty(0, dtype=torch.long)
    if not (key := _key(tokenizer, texts, special)):
        return _tokenised(tokenizer, texts, special)
    path = files.cache_folder() / "tokens" / f"{key}.safetensors"
    if (tokens := _kept(path)) is None:
        tokens = _tokenised(tokenizer, texts, special)
        with suppress(OSError):  # a full disk or a home that cannot be written to: they are made again next time
            _keep(path, tokens)
    return tokens


def _tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document], special: bool) -> Int[Tensor, " tokens"]:
    if all(isinstance(text, str) for text in texts):
        how = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        ids = tokenizer(list(map(str, texts)), **how)["input_ids"]
    else:
        ids = [_ids(tokenizer, text, special) for text in texts]
    return torch.cat([torch.tensor(row, dtype=torch.long) for row in ids])


def _key(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document], special: bool) -> str:
    """A hash of all that tokens depend on; none of what is not kept: short texts, and tokenizers that are no data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = _written(texts)
    if backend is None or sum(map(len, written)) < _WORTH_KEEPING:
        return ""
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    made_by = [type(tokenizer).__name__, *map(version, ("tokenizers", "transformers"))]
    digest = hashlib.sha256(json.dumps([made_by, settings, tokenizer.chat_template, special], default=str).encode())
    for part in (backend.to_str(), *written):
        digest.update(_digest(part))
    return digest.hexdigest()


def _written(texts: Sequence[Document]) -> list[str]:
    return [text if isinstance(text, str) else json.dumps(text) for text in texts]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _kept(path: Path) -> Int[Tensor, " tokens"] | None:
    """The tokens in a file, if it is there and as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, said = file.get_tensor("tokens"), file.metadata()["sha256"]
        path.touch()
    except (OSError, SafetensorError):
        return None
    return tokens.long() if hashlib.sha256(tokens.numpy().tobytes()).hexdigest() == said else None


def _keep(path: Path, tokens: Int[Tensor, " tokens"]) -> None:
    small = tokens.int()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as partial:
        save_file({"tokens": small}, partial, {"sha256": hashlib.sha256(small.numpy().tobytes()).hexdigest()})
    by_age = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in by_age[:-_MOST_KEPT]:
        file.unlink(missing_ok=True)


def _ids(tokenizer: PreTrainedTokenizerBase, text: Document, special: bool) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("dataset: has conversations, and the model's tokenizer no chat template; name one of texts")
    return list(tokenizer.apply_chat_template(text, tokenize=True, return_dict=False))


def _too_little(dataset: Dataset, needed: int, seqlen: int, found: int) -> str:
    return (
        f"too little text in {describe(dataset)}: {needed} windows of {seqlen} tokens need {needed * seqlen}, "
        f"found {found}; lower nsamples or seqlen, or give more text"
    )


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, received {value}")
    return value
