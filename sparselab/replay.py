"""Whether work that is done again is the same: what goes in, where it is done, and the numbers that come out."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparselab.errors import ReplayError
from sparselab.manifest import Manifest, is_cost

# Sums in another order round otherwise, weights of nearly equal score change places, and later ones are compensated for
# others: two processes in place of one move layer errors of the bundled model by up to 0.4%, perplexities by less.
TOLERANCE = 0.01
# Arguments about one run of a command, not its result; the last is for whoever replays to say, as it is not safe.
_OF_ONE_RUN = ("out", "overwrite", "resume", "measure_error", "trust_remote_code")
_IDENTITY = ("method", "pattern", "dataset", "seed", "block", "layer", "task", "metric")
# Of inputs: names, and what follows from the tokens. Hashes say whether the same goes in.
_TOLD_ONLY = ("name", "revision", "dataset", "bos", "bos_id", "windows_that_begin_with_bos", "bos_in_all_windows")
# Known to 1%, and as a share of itself it says nothing where it is small.
_NOT_COMPARED = ("optimality_gap",)
_SHOWN = 10  # deviations
_HASH = re.compile("[0-9a-f]{40,}")
_ROWS = ", rows"


@dataclass(frozen=True)
class Deviation:
    """A number that is not what it was.

    Args:
        where: which.
        was, now: then and now.
    """

    where: str
    was: Any
    now: Any

    @property
    def relative(self) -> float:
        """|was − now| / max(|was|, |now|); infinite where one of them is no number."""
        try:
            was, now = float(self.was), float(self.now)
            share = abs(was - now) / max(abs(was), abs(now))
        except (TypeError, ValueError, OverflowError):
            return math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        return "{} (was {}, is {})".format(self.where, *self.shown)

    @property
    def shown(self) -> tuple[str, str]:
        """Then and now in as many digits as tell them apart."""
        was, now = _short(self.was), _short(self.now)
        return (was, now) if was != now else (repr(self.was), repr(self.now))


@dataclass(frozen=True)
class Verdict:
    """What came of the comparison of two results.

    Args:
        numbers: how many were compared.
        deviations: those that are not equal, the most different first.
        files: how many files of weights were compared.
        differing: those that are not the same bytes.
        tolerance: the largest relative difference that is called agreement.
        reasons: what differs besides: in inputs, settings, versions and machine.
    """

    numbers: int
    deviations: list[Deviation]
    files: int
    differing: list[str]
    tolerance: float
    reasons: list[str]

    @property
    def exact(self) -> bool:
        """Whether all is the same to the last bit."""
        return not self.deviations and not self.differing

    @property
    def beyond(self) -> list[Deviation]:
        """Deviations that are larger than the tolerance."""
        return [each for each in self.deviations if each.relative > self.tolerance]

    @property
    def agrees(self) -> bool:
        """Whether all is within the tolerance. Other weights with the very same errors are no matter of rounding."""
        return self.exact or bool(self.deviations and not self.beyond)

    def __str__(self) -> str:
        """As a user reads it."""
        return "\n".join(self._measured() + self._concluded())

    def complaint(self) -> str:
        """Of a disagreement, in one line."""
        if not self.beyond:
            return f"disagrees: all numbers are equal, but not the bytes of {_listed(self.differing)}"
        return (
            f"disagrees: {len(self.beyond)} of {self.numbers} numbers differ by more than {self.tolerance:g}, "
            f"most of all {self.beyond[0]}"
        )

    def _measured(self) -> list[str]:
        lines = [_line("numbers", "the same" if not self.deviations else self._largest())]
        if self.files:
            lines.append(
                _line("weights", f"other bytes in {_listed(self.differing)}" if self.differing else "the same")
            )
        return lines

    def _largest(self) -> str:
        largest = self.deviations[0]
        return (
            f"{self.numbers - len(self.deviations)} of {self.numbers} are equal; the largest relative difference is "
            f"{largest.relative:.2g}: {largest}"
        )

    def _concluded(self) -> list[str]:
        files = f" and {self.files} files" if self.files else ""
        if self.exact:
            return [f"Agrees to the last bit: {self.numbers} numbers{files}."]
        if self.agrees:
            return [f"Agrees within {self.tolerance:g}, not to the last bit."]
        return [*self._table(), *self._why()]

    def _table(self) -> list[str]:
        if not self.beyond:
            return []
        rows = [(f"{each.relative:.2g}", *each.shown, each.where) for each in self.beyond]
        shown = [("relative", "was", "is", "of"), *rows[:_SHOWN]]
        widths = [max(len(row[column]) for row in shown) for column in range(3)]
        lines = ["  ".join([*map(str.rjust, row[:3], widths), row[3]]) for row in shown]
        return ["", *lines, *([f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []), ""]

    def _why(self) -> list[str]:
        if self.reasons:
            return ["What differs besides, and may be why:", *(f"  {reason}" for reason in self.reasons)]
        return [
            "Inputs, settings, versions and machine are the same, so the results should be, too: the manifest was "
            "changed, or something here does not compute the same twice (sums on a GPU, for one)."
        ]


class Replay:
    """Work that is done again.

    Args:
        was: from `manifest.read`.
        force: go on though other things go in.
        tell: called with each line of what is found.
    """

    def __init__(self, was: Manifest, force: bool, tell: Callable[[str], object]) -> None:
        self._was, self._force = was, force
        self._say = tell
        self._reasons: list[str] = []

    def words(self) -> list[str]:
        """The command and its options, for the parser; without those that are about one run only."""
        settings = self._was["settings"]
        words = [self._was["command"]]
        for name, value in settings.items():
            option = "--" + name.replace("_", "-")
            if name in ("model", *_OF_ONE_RUN) or value is None or value is False:
                continue
            if isinstance(value, list):
                words += [option, *map(str, value)]
            else:
                words.append(option if value is True else f"{option}={value}")
        return [*words, "--", settings["model"]]

    def before(self, now: Manifest) -> None:
        """Tell what goes in and where the work is done, beside what was; a `Request.before`.

        Raises:
            ReplayError: other things go in, and it was not forced.
        """
        self._tell(f"{self._was.get('line') or 'called from Python'} ({self._was.get('date')})")
        differing = []
        for name in {**self._was["inputs"], **now["inputs"]}:
            found = self._compare(name, self._was["inputs"].get(name), now["inputs"].get(name))
            differing += [each for each in found if not each.startswith(tuple(f"{name}: {own} " for own in _TOLD_ONLY))]
        differing += self._compare("settings", _lasting(self._was["settings"]), _lasting(now["settings"]))
        self._compare("versions", *({**each["versions"], "python": each.get("python")} for each in (self._was, now)))
        self._compare("machine", self._was["machine"], now["machine"])
        if not self._was["results"].get("finished", True):
            self._tell("The manifest is of unfinished work; what it has is compared.")
        if differing and not self._force:
            raise ReplayError(
                f"other things would go in: {printable('; '.join(differing))}; nothing was run, --force does it anyway"
            )
        self._tell("Running it again …")

    def verdict(self, now: Manifest, tolerance: float = TOLERANCE) -> Verdict:
        """Compare the numbers.

        Args:
            now: the manifest of the new run.
            tolerance: the largest relative difference that is called agreement.
        """
        was, found = (dict(_numbers(each["results"])) for each in (self._was, now))
        if not self._was["results"].get("finished", True):
            was = {where: value for where, value in was.items() if not where.endswith(_ROWS)}
        was = {where: value for where, value in was.items() if value is not None}  # was not measured
        pairs = [Deviation(where, value, found.get(where)) for where, value in was.items()]
        deviations = sorted((each for each in pairs if each.was != each.now), key=lambda each: -each.relative)
        sums, new = (each["results"].get("checksums", {}) for each in (self._was, now))
        differing = [name for name in sums if sums[name] != new.get(name)]
        return Verdict(len(was), deviations, len(sums), differing, tolerance, self._reasons)

    def _tell(self, text: str) -> None:
        self._say(printable(text))

    def _compare(self, group: str, was: Any, now: Any) -> list[str]:
        """Tell what differs in a group; what was not recorded does not."""
        if was is None:
            self._tell(_line(group, "not recorded"))
            return []
        differing, unknown = [], []
        for name, then, value in _pairs(was, now):
            if then is None and value is not None:
                unknown += [name] * (value is not False)  # which an option is that was not given
            elif then != value:
                differing.append(f"{name} was {_short(then)}, is {_short(value)}")
        missing = f" ({', '.join(unknown)} not recorded)" if unknown else ""
        self._tell(_line(group, ("; ".join(differing) or "the same") + missing))
        self._reasons += [f"{group}: {each}" for each in differing]
        return [f"{group}: {each}" for each in differing]


def printable(text: str) -> str:
    """The text without what would steer a terminal: a manifest may come from anybody."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every number of a result, by words that say which it is."""
    for name, value in results.items():
        if name in ("checksums", "tables", "finished"):
            continue
        if not isinstance(value, list):
            yield name, value
            continue
        yield name + _ROWS, len(value)
        labels = Counter[str]()
        for number, row in enumerate(value):
            if not isinstance(row, dict):
                yield f"{name} {number}", row
                continue
            label = _label(row)
            labels[label] += 1
            again = f" ({labels[label]})" if labels[label] > 1 else ""
            yield from ((f"{label}{again}, {column}", each) for column, each in row.items() if _is_number(column))


def _is_number(column: str) -> bool:
    return column not in (*_IDENTITY, *_NOT_COMPARED) and not is_cost(column)


def _label(row: Mapping[str, Any]) -> str:
    named = {name: row[name] for name in _IDENTITY if row.get(name) not in (None, "")}
    return " ".join(f"{name} {value}" if name in ("seed", "block") else str(value) for name, value in named.items())


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _OF_ONE_RUN}


def _pairs(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Two nested tables side by side."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        yield name or "it", was, now
        return
    for key in {**was, **now}:
        yield from _pairs(was.get(key), now.get(key), f"{name} {key}".strip())


def _line(group: str, text: str) -> str:
    return f"{group:<12} {text}"


def _short(value: Any) -> str:
    """A value in a few letters; the beginning of a hash tells it from others."""
    if isinstance(value, float):
        return f"{value:.9g}"
    text = "none" if value is None else str(value)
    most = 12 if _HASH.fullmatch(text) else 200
    return text if len(text) <= most else f"{text[:most]}…"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
