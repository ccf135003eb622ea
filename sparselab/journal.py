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
        said, self.entries, damaged = _read(path)
        if damaged:
            self.damage = f"{path.name}: line {damaged} is damaged; what it and later ones say is done again"
        if not self.entries:
            self._work = work
            self._rewrite()
            return
        if not resume:
            raise OutputError(
                f"{path.parent}: holds what an interrupted run has finished; pass --resume to go on with it, "
                "or delete that folder to start anew"
            )
        self._work = said or {}
        _check_same(path, self._work, json.loads(json.dumps(work)))
        if self.damage:
            self._rewrite()

    def append(self, entry: dict[str, Any]) -> None:
        """Add a finished piece of work; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def drop(self, number: int, why: str = "") -> None:
        """Forget an entry and all after it: what it speaks of is damaged, if `why` says so, or is done again anyway."""
        if why:
            self.damage = f"{why}; it and what came after it is done again"
        self.entries = self.entries[:number]
        self._rewrite()

    def _rewrite(self) -> None:
        with written_whole(self.path) as partial:
            partial.write_bytes(b"".join(map(_line, [self._work, *self.entries])))


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What work a journal is about, None if that cannot be told, and what of it is finished; changes nothing."""
    work, entries, _ = _read(path)
    return work, entries


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """The work, what of it is finished, and the number of the first damaged line; 0 if there is none."""
    sound: list[dict[str, Any]] = []
    damaged = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else [], 1):
        if (entry := _parsed(line)) is None:
            damaged = number
            break
        sound.append(entry)
    return (sound[0] if sound else None), sound[1:], damaged


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
