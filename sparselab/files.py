"""Output folders: checked before the work, complete or absent after it, never somebody else's."""

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sparselab.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

# Written into every output folder: what is listed in it may be replaced by --overwrite, and nothing else.
STAMP = "sparselab.json"
# In the folder of work that can be taken up again, says what of it is done.
JOURNAL = "journal.jsonl"
_LOCK = ".lock"
_PACKAGE = Path(__file__).resolve().parent
# Whose versions may change a result.
_PACKAGES = ("sparselab", "torch", "transformers", "tokenizers", "numpy", "safetensors", "numba")


@contextmanager
def finished_output(path: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A folder beside the output to write to; it takes the output's place once the work inside is done.

    If the work fails, the folder goes again; but with a stamp in it, it holds something finished: then it stays, and a
    note on the error says where. It also stays if something else has come to lie at the output's place meanwhile.

    Args, Raises: see `check_output`.
    """
    folder = check_output(path, overwrite, inputs)
    before, absent, done = _contents(folder), _absent(folder), False
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        yield partial
        done = True
        _put_in_place(partial, folder, before)
    except BaseException as error:
        if done or (partial / STAMP).is_file():
            error.add_note(f"what was finished is kept in {partial}")
        else:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_empty(absent)
        raise


@contextmanager
def resumable_output(path: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Like `finished_output`, but what has been finished stays when the work inside fails, for another time.

    The folder to write to always has the same name, and belongs to one process at a time; when that dies, the system
    sets it free. What it holds when it is entered is what earlier processes have left.

    Args, Raises: see `check_output`; also OutputError if another process is at work there.
    """
    folder = check_output(path, overwrite, inputs)
    absent, work = _absent(folder), unfinished_folder(folder)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{path}: another process writes to it, in {work}; wait, or choose another --out") from None
    try:
        _undo_half_a_replacement(work, folder)
        before = _contents(folder)
        yield work
        (work / _LOCK).unlink()
        _put_in_place(work, folder, before)
    except BaseException as error:
        if something_finished(work):
            error.add_note(f"what was finished is kept in {work}; pass --resume to go on")
        else:
            shutil.rmtree(work, ignore_errors=True)
            _remove_empty(absent)
        raise
    finally:
        lock.release()


def _undo_half_a_replacement(work: Path, folder: Path) -> None:
    """After a process that was killed while it put its output in place."""
    aside = _aside(work)
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def unfinished_folder(path: str | Path) -> Path:
    """Where `resumable_output` writes meanwhile."""
    folder = Path(path).resolve()
    return folder.with_name(f".{folder.name}.unfinished")


def clear(work: Path, keep: Iterable[str]) -> None:
    """Remove what killed processes have left in a folder of resumable work, but for its journal and what is named."""
    for path in work.iterdir():
        if path.name in (JOURNAL, _LOCK, *keep):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def something_finished(work: Path) -> bool:
    """Whether a folder of resumable work has a journal that says more than what the work is."""
    journal = work / JOURNAL
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1


def check_output(path: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """The output's resolved path, once it is known that a folder can be put there; leaves everything as it was.

    Args:
        path: a folder that is absent, empty, or (with `overwrite`) an earlier output and nothing but that.
        overwrite: allow an earlier output.
        inputs: files and folders that the work reads; the output may not be one of them, in one or around one.

    Raises:
        OutputError: it holds something, is a file, an input, a mount point or the current folder, or cannot be written.
    """
    try:
        folder = Path(path).resolve()
        if folder.exists():
            _check_replaceable(path, folder, overwrite)
        _check_place(path, folder, inputs)
        _try_writing(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written ({reason}); choose another --out") from error
    return folder


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin where the output will not fit.

    Args:
        folder: where it will be written.
        needed: its size in bytes.

    Raises:
        OutputError: less is free.
    """
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: the output takes {needed / 1e6:.0f} MB, found {free / 1e6:.0f} MB free; "
            "make room or write elsewhere"
        )


def write_stamp(
    folder: Path, command: str, settings: Mapping[str, Any], more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Record in an output folder what was run, with which settings and versions, and the files it holds by now.

    Args:
        folder: the output.
        command: of the command line.
        settings: all that was asked for.
        more: what else there is to say; see `manifest`.
    """
    stamp = {**more, "command": command, "settings": dict(settings), **versions()}
    stamp["files"] = sorted(_file_names(folder) | {STAMP})
    write_text(folder / STAMP, _readable(stamp) + "\n")


def versions() -> dict[str, Any]:
    """Of Python and of the packages that a result may depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"versions": found, "python": platform.python_version()}


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """What `write_stamp` recorded; None if there is nothing or nothing legible."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and "command" in stamp else None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The name under which to write a file, which then gets its own: it is there whole or not at all."""
    partial = _partial(path)
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _on_disk(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where things lie that can be made again at any time: `$SPARSELAB_CACHE`, or `~/.cache/sparselab`."""
    return Path(os.environ.get("SPARSELAB_CACHE") or Path.home() / ".cache" / "sparselab")


def bundled(name: str) -> Path:
    """Where something lies that comes with the package: inside it once it is installed, or beside it in a checkout.

    Args:
        name: its path in a checkout, such as "data/tiny"; pyproject.toml puts it at the same path in the package.
    """
    installed = _PACKAGE / name
    return installed if installed.exists() else _PACKAGE.parent / name


def markdown_table(table: "pd.DataFrame") -> str:
    """A table of text as Markdown, columns of the frame in order, underscores of their names as spaces."""
    rows = [
        [str(name).replace("_", " ") for name in table],
        ["---"] * len(table.columns),
        *table.astype(str).to_numpy(),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _readable(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry that a reader may look for, and for each row of a table."""
    inside, end = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if depth < 3 and isinstance(value, dict) and value:
        entries = [f"{json.dumps(str(key))}: {_readable(each, depth + 1)}" for key, each in value.items()]
        return "{" + inside + f",{inside}".join(entries) + end + "}"
    if depth < 3 and isinstance(value, list) and any(isinstance(each, dict) or depth == 1 for each in value):
        return "[" + inside + f",{inside}".join(_readable(each, depth + 1) for each in value) + end + "]"
    return json.dumps(value, default=str)


def _check_replaceable(path: str | Path, folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise OutputError(f"{path}: expected a folder to write to, found a file; choose another --out")
    if not any(folder.iterdir()):
        return
    stamp = read_stamp(folder)
    if stamp is None:
        raise OutputError(
            f"{path}: expected an empty folder, found files in it and no {STAMP}, "
            "so sparselab did not write them and will not overwrite them; choose another --out"
        )
    if not overwrite:
        raise OutputError(f"{path}: expected an empty folder, found files in it; pass --overwrite or another --out")
    present = _file_names(folder)
    ours = {Path(name) for name in stamp.get("files", present)}  # stamps did not always list files
    if strangers := sorted(present - {str(name) for file in ours for name in (file, _partial(file))}):
        raise OutputError(
            f"{path}: holds files that sparselab did not write, first {strangers[0]}; move them or choose another --out"
        )


def _check_place(path: str | Path, folder: Path, inputs: Iterable[str | Path]) -> None:
    # The output comes into place by a rename, which neither of these survives.
    if os.path.ismount(folder) or _lies_in(Path.cwd(), folder):
        raise OutputError(
            f"{path}: is a mount point or the current folder, which cannot be replaced; choose a folder inside it"
        )
    for given in inputs:
        source = Path(given).resolve()
        if source.exists() and (_lies_in(source, folder) or _lies_in(folder, source)):
            raise OutputError(f"{path}: is, holds or lies in {given}, which is read; choose another --out")


def _try_writing(folder: Path) -> None:
    """Make the folder, its parents and a neighbour as the work will, and take away again what was not there."""
    absent = _absent(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_prefix(folder), dir=folder.parent):
            pass
    finally:
        _remove_empty(absent)


def _put_in_place(partial: Path, folder: Path, before: set[tuple[str, int, int]]) -> None:
    """Rename the finished folder to its name; what stood there is only deleted if it still is what it was before."""
    partial.chmod(0o755)
    aside = _aside(partial)
    if os.path.lexists(folder):
        folder.rename(aside)
    try:
        if _contents(aside) != before:
            raise OutputError(f"{folder}: somebody else has written there meanwhile; it is left alone")
        partial.rename(folder)
        _on_disk(folder.parent)
    except BaseException:
        if os.path.lexists(aside):
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        warnings.warn(f"{folder}: the output it replaces cannot be deleted and is left in {aside}", stacklevel=2)


def _aside(partial: Path) -> Path:
    return partial.with_name(partial.name + ".replaced")


def _on_disk(folder: Path) -> None:
    """Make renames in a folder outlive a power cut; only POSIX can, and has to."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _contents(folder: Path) -> set[tuple[str, int, int]]:
    """What is in a folder, with sizes and times of change; anything but a folder is itself its contents."""
    if not os.path.lexists(folder):
        return set()
    paths = folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else [folder]
    return {(str(path.relative_to(folder)), (s := path.lstat()).st_size, s.st_mtime_ns) for path in paths}


def _file_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another or below it, by the files' identity: names may differ in case or by a bind mount."""
    return outer.exists() and any(path.exists() and path.samefile(outer) for path in (inner, *inner.parents))


def _absent(folder: Path) -> list[Path]:
    """The folder and those of its parents that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _prefix(folder: Path) -> str:
    return f".{folder.name[:40]}.partial-"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
