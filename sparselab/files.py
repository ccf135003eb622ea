"""Output folders: checked before the work, complete or absent after it, never somebody else's."""

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselab.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

# Written into every output folder; its presence is what allows --overwrite to replace a folder.
STAMP = "sparselab.json"


def prepare_output(path: str | Path, overwrite: bool = False) -> Path:
    """Create an output folder, or empty one that sparselab wrote earlier.

    Args:
        path: a folder that is absent, empty, or (with `overwrite`) an earlier output.
        overwrite: replace an earlier output.

    Raises:
        OutputError: it holds something, is a file, or cannot be written.
    """
    folder = check_output(path, overwrite)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def finished_output(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside the output that takes its place when the work inside succeeds, and goes if it fails.

    Args, Raises: see `prepare_output`.
    """
    folder = check_output(path, overwrite)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_output(path: str | Path, overwrite: bool = False) -> Path:
    """The output path, once it is known that a folder can be written there; creates its parents, nothing else.

    Args, Raises: see `prepare_output`.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{path}: expected a folder to write to, found a file; choose another --out")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise OutputError(f"{path}: expected an empty folder, found files in it; pass --overwrite or another --out")
        if not (folder / STAMP).is_file():
            raise OutputError(f"{path}: has no {STAMP}, so sparselab did not write it and will not overwrite it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder if folder.exists() else folder.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    return folder


def write_stamp(folder: Path, command: str, settings: dict[str, Any]) -> None:
    """Record in an output folder what was run, with which settings and versions."""
    packages = ("sparselab", "torch", "transformers", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    stamp = {"command": command, "settings": settings, "versions": versions, "python": platform.python_version()}
    write_text(folder / STAMP, json.dumps(stamp, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def markdown_table(table: "pd.DataFrame") -> str:
    """A table of text as Markdown, columns of the frame in order, underscores of their names as spaces."""
    rows = [
        [str(name).replace("_", " ") for name in table],
        ["---"] * len(table.columns),
        *table.astype(str).to_numpy(),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
