"""Which text a name stands for: the standard library of the running interpreter, files, or a dataset of the hub.

Names can be checked without torch, which is not imported before the hub is asked.
"""

import gzip
import hashlib
import json
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "heldout"]
Dataset = str | Path | Sequence[str]
Document = str | list[dict[str, str]]  # a text, or a conversation: messages with role and content

# Left out of the `stdlib` corpus so that it is the same everywhere: what some distributions do not install (tests,
# Tk, IDLE), what newer Pythons removed as a whole, tables written by programs, and packages that are not the library.
_NOT_EVERYWHERE = {
    *("test", "tests", "idlelib", "idle_test", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("encodings", "pydoc_data", "__phello__", "lib-dynload", "site-packages", "dist-packages"),
}
_HELDOUT_ONE_IN = 8
_RECORDS = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
_SPLITS = {"train": ("train",), "heldout": ("test", "validation", "train")}
_SPLIT_NAMES = ("train", "validation", "test")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COLUMNS = ("text", "messages", "conversations")
MIRROR = "SPARSELAB_DATASETS"  # names a folder with copies of hub datasets, each in owner/name


@dataclass(frozen=True)
class Source:
    """Documents, and how they become token windows.

    Args:
        documents: texts or conversations.
        joiner: put between documents, which are then tokenised as one text; None: each is tokenised by itself.
        draws: how calibration windows are drawn: "windows" that do not overlap, shuffled; "crops" from random places
            of the joined text; "documents": each a crop of a random document that is longer than a window.
        most: the most evaluation windows.
    """

    documents: Sequence[Document]
    joiner: str | None = None
    draws: Literal["windows", "crops", "documents"] = "windows"
    most: int | None = None


@dataclass(frozen=True)
class _Paper:
    """A corpus as the papers read it; `limit` is the number of documents, from the first on."""

    repository: str
    files: dict[Split, str]
    column: str
    joiner: dict[Split, str | None]
    draws: Literal["crops", "documents"] = "crops"
    limit: dict[Split, int | None] | None = None
    most: int | None = None
    revision: str | None = None


PAPERS = {
    "wikitext2": _Paper(
        "Salesforce/wikitext",
        {"train": "wikitext-2-raw-v1/train-*.parquet", "heldout": "wikitext-2-raw-v1/test-*.parquet"},
        "text",
        {"train": "\n\n", "heldout": "\n\n"},
    ),
    "ptb": _Paper(
        "ptb-text-only/ptb_text_only",
        {"train": "penn_treebank/train/*.parquet", "heldout": "penn_treebank/test/*.parquet"},
        "sentence",
        {"train": " ", "heldout": " "},
        revision="refs/convert/parquet",  # what the hub made of a dataset that was a program
    ),
    # Of the first shard, 300 MB, the papers take documents anywhere; its first ones come through a hundredth of it.
    "c4": _Paper(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "heldout": "en/c4-validation.00000-of-00008.json.gz"},
        "text",
        {"train": None, "heldout": " "},
        "documents",
        {"train": 10_000, "heldout": 1100},
        most=256,
    ),
}


def source(dataset: Dataset, split: Split = "train") -> Source:
    """The text that a name stands for.

    Args:
        dataset: "stdlib"; "wikitext2", "ptb" or "c4", read as the papers do; a dataset of the hub as
            `owner/name[:config[:split[:column]]]`; a text file (one document), a .jsonl or .parquet file (one each
            record), or a folder of either, all of them with `:config:split:column` after it if need be; or a list of
            strings.
        split: "train" for calibration, "heldout" for evaluation: which side of "stdlib", which files of the papers'
            corpora, and which split of others, if none is named: test, else validation, else train.

    Raises:
        ValueError: there is no such thing, it cannot be reached or read, or it has no column of text.
    """
    if split not in _SPLITS:
        raise ValueError(f"split: expected 'train' or 'heldout', received {split!r}")
    if not isinstance(dataset, str | Path):
        return Source(_checked_strings(dataset))
    if dataset == "stdlib":
        return Source(stdlib_documents(split))
    if dataset in PAPERS:
        paper = PAPERS[str(dataset)]
        limit = (paper.limit or {}).get(split)
        found = _Wanted(str(dataset), paper.repository, files=paper.files[split], revision=paper.revision)
        texts = _documents(str(dataset), found.records(split, limit), paper.column)
        return Source(texts, paper.joiner[split], paper.draws, paper.most)
    name, config, wanted, column = _parsed(dataset)
    if (path := _existing(name)) is None:
        return Source(_documents(str(dataset), _Wanted(str(dataset), name, config, wanted).records(split), column))
    return Source(_of_files(str(dataset), _of_one(_files(path, config), split, wanted), column))


def check_name(dataset: str) -> None:
    """Raise ValueError where a name can be no dataset: no file or folder here, and none that the hub could have."""
    if dataset != "stdlib" and dataset not in PAPERS:
        _parsed(dataset)


def check_apart(dataset: Dataset, eval_dataset: Dataset) -> None:
    """Raise ValueError where calibration and evaluation would read the same text: all but those with two sides."""
    if dataset == eval_dataset and not (isinstance(dataset, str) and dataset in ("stdlib", *PAPERS)):
        raise ValueError(
            f"dataset: calibration and evaluation would both read {describe(dataset)}; "
            "name another text for one of them"
        )


def describe(dataset: Dataset) -> str:
    """The dataset's name as tables and figures state it."""
    if isinstance(dataset, str | Path):
        path = _existing(str(dataset))
        return str(dataset) if path is None or dataset == "stdlib" else path.name
    return f"{len(dataset)} given texts"


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
        FileNotFoundError: this Python carries no library sources.
    """
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


def stdlib_documents(split: Split) -> list[str]:
    """The texts of `stdlib_files`."""
    return [_read_text(path) for path in stdlib_files(split)]


@dataclass(frozen=True)
class _Wanted:
    """A dataset that the hub has, or a folder of copies."""

    asked: str
    repository: str
    config: str | None = None
    split: str | None = None
    files: str | None = None
    revision: str | None = None

    def records(self, split: Split, limit: int | None = None) -> Iterable[dict[str, Any]]:
        """The first `limit` of them: no more are fetched then."""
        mirror = Path(os.environ.get(MIRROR, ""), self.repository)
        if not os.environ.get(MIRROR) or not mirror.is_dir():
            return self._of_hub(split, limit)
        if self.files is None:
            return _records_of(_of_one(_files(mirror, self.config), split, self.split))
        if not (files := sorted(mirror.glob(self.files))):
            raise ValueError(f"dataset {self.asked!r}: expected {self.files} in {mirror}, found none")
        return islice(_records_of(files), limit)

    def _of_hub(self, split: Split, limit: int | None) -> list[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            why = "the package datasets is missing (pip install 'sparselab[data]')"
            raise ValueError(self._complaint(why)) from error
        from sparselab.models import loading

        reachable = loading.hub_answers()
        with loading.quiet(), offline(not reachable):
            try:
                how = {"data_files": {"all": self.files}, "revision": self.revision} if self.files else {}
                name = "all" if self.files else self.split or self._split(datasets, split)
                found = datasets.load_dataset(
                    self.repository, self.config, split=name, streaming=limit is not None, **how
                )
                return list(islice(found, limit))
            except Exception as error:  # whatever the libraries below raise
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(self._complaint(why if reachable else "the hub cannot be reached")) from error

    def _split(self, datasets: Any, split: Split) -> str:
        there: list[str] = datasets.get_dataset_split_names(self.repository, self.config)
        return next((name for name in _SPLITS[split] if name in there), there[0])

    def _complaint(self, why: str) -> str:
        name = textwrap.shorten(self.asked, 100)
        return (
            f"dataset {name!r}: no such file or folder here, so that the hub was to give {self.repository}: {why}; "
            f"without it 'stdlib', text, .jsonl and .parquet files, folders of them, and copies of datasets below "
            f"${MIRROR} can be used"
        )


@contextmanager
def offline(there_is_no_hub: bool) -> Iterator[None]:
    """Where the hub does not answer, datasets looks only at what is on this disk: its client would try for minutes."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or there_is_no_hub
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _parsed(dataset: str | Path) -> tuple[str, str | None, str | None, str | None]:
    """Name, config, split and column; what is the name of a file as a whole has none of the others."""
    if _existing(str(dataset)) is not None:
        return str(dataset), None, None, None
    name, *parts = str(dataset).split(":")
    if len(parts) > 3 or (_existing(name) is None and not _HUB_NAME.fullmatch(name)):
        raise ValueError(
            f"dataset {textwrap.shorten(str(dataset), 100)!r}: expected 'stdlib', {', '.join(map(repr, PAPERS))}, an "
            "existing file or folder, a list of strings, or owner/name[:config[:split[:column]]] on the hub"
        )
    config, split, column = [*(part or None for part in parts), None, None, None][:3]
    return name, config, split, column


def _existing(name: str) -> Path | None:
    try:
        return Path(name) if name and Path(name).exists() else None  # Path("") would be the current folder
    except OSError:  # a text given in place of a name is too long to be one
        return None


def _files(path: Path, config: str | None) -> list[Path]:
    """A file, or those of a folder in the order of their paths: records if there are any, else texts."""
    if path.is_file():
        return [path]
    inside = path / config if config else path
    found = sorted(file for file in inside.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [file for file in found if file.name.endswith(_RECORDS)] or found


def _of_one(files: list[Path], split: Split, wanted: str | None) -> list[Path]:
    """The files of the wanted split; where none is wanted, of the one that fits, if all are named after splits."""
    named = {file: file.name.partition(".")[0].partition("-")[0] for file in files}
    named = {file: name if name in _SPLIT_NAMES else file.parent.name for file, name in named.items()}
    if wanted is None:
        if not files or not set(named.values()) <= set(_SPLIT_NAMES):
            return files
        wanted = next(name for name in (*_SPLITS[split], *_SPLIT_NAMES) if name in named.values())
    if chosen := [file for file in files if named[file] == wanted]:
        return chosen
    found = ", ".join(sorted(set(named.values()))) or "none"
    raise ValueError(f"dataset: expected files of split {wanted!r}, found those of {found}")


def _of_files(asked: str, files: list[Path], column: str | None) -> list[Document]:
    records = [file for file in files if file.name.endswith(_RECORDS)]
    texts = [_read_text(file) for file in files if file not in records]
    return [*texts, *_documents(asked, _records_of(records), column)]


def _records_of(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    return chain.from_iterable(map(_records, files))


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError as error:
            raise ValueError(f"{file}: needs the package pyarrow; pip install 'sparselab[data]'") from error
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        except ArrowInvalid as error:
            raise ValueError(f"{file}: expected a parquet file ({error})") from error
        return
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is no record")
                yield record
    except (OSError, EOFError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise ValueError(f"{file}: expected one JSON record a line ({error})") from error


def _documents(asked: str, records: Iterable[dict[str, Any]], column: str | None) -> list[Document]:
    """What stands in the column of text."""
    found: list[Document] = []
    for record in records:
        if column is None:
            strings = [name for name, value in record.items() if isinstance(value, str)]
            column = next((name for name in _COLUMNS if name in record), strings[0] if len(strings) == 1 else None)
        value: Any = record.get(column or "")
        if not isinstance(value, str) and not _is_conversation(value):
            raise ValueError(
                f"dataset {asked!r}: expected a column of texts or conversations, received "
                f"{column or 'none named'} of {', '.join(record)}; name it as name:config:split:column"
            )
        found.append(value)
    return found


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value
    )


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
