"""A record of finished pieces of work that survives whatever happens to the process that writes it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sparselab.errors import OutputError
from sparselab.files import written_whole


class Journal:
    """A file of lines, the first saying what the work is, each other one what has been finished.

    A line counts once it is on the disk as a whole. One that is not what was written, and all after it, are dropped, so
    that their work is done again.

    Args:
        path: the file; made if it is absent.
        work: everything that has to be the same for the work to go on: settings, inputs, versions.
        resume: whether to go on, if something is finished.

    Attributes:
        entries: what is finished.
        damage: what was dropped, in words; empty if nothing was.

    Raises:
        OutputError: something is finished, and it is of other work (says in what that differs), or `resume` is False.
    """

    def __init__(self, path: Path, work: dict[str, Any], resume: bool) -> None:
        self.path, self.damage = path, ""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        said = [_parsed(line) for line in lines]
        sound = next((number for number, entry in enumerate(said) if entry is None), len(said))
        if sound < len(lines):
            self.damage = f"{path.name}: line {sound + 1} is damaged; what it and later ones say is done again"
        self.entries = [entry for entry in said[1:sound] if entry is not None]
        if not self.entries:
            self._rewrite([_line(work)])
            return
        if not resume:
            raise OutputError(
                f"{path.parent}: holds what an interrupted run has finished; pass --resume to go on with it, "
                "or delete that folder to start anew"
            )
        _check_same(path, said[0] or {}, json.loads(json.dumps(work)))
        if self.damage:
            self._rewrite(lines[:sound])

    def append(self, entry: dict[str, Any]) -> None:
        """Add a finished piece of work; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def drop(self, number: int, why: str) -> None:
        """Forget an entry and all after it, since what it speaks of is not there any more."""
        self.damage = f"{why}; it and what came after it is done again"
        lines = self.path.read_bytes().splitlines(keepends=True)
        self.entries = self.entries[:number]
        self._rewrite(lines[: 1 + number])

    def _rewrite(self, lines: list[bytes]) -> None:
        with written_whole(self.path) as partial:
            partial.write_bytes(b"".join(lines))


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What work a journal is about, None if that cannot be told, and what of it is finished; changes nothing."""
    try:
        said = [_parsed(line) for line in path.read_bytes().splitlines(keepends=True)]
    except OSError:
        return None, []
    sound = next((number for number, entry in enumerate(said) if entry is None), len(said))
    return (said[0] if sound else None), [entry for entry in said[1:sound] if entry is not None]


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry)
    return json.dumps({"entry": entry, "check": _digest(text)}).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is not as it was written."""
    try:
        held = json.loads(line)
        entry: dict[str, Any] = held["entry"]
        return entry if line.endswith(b"\n") and held["check"] == _digest(json.dumps(entry)) else None
    except (ValueError, KeyError, TypeError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        words = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differing)
        raise OutputError(
            f"{path.parent}: holds the beginning of other work: {words}; "
            "go on with what was asked for then, or delete that folder to start anew"
        )
