"""The papers' perplexities, and what one's own mean beside them.

`benchmarks/published.csv` holds one a row; an empty pattern is the dense model. Two that contradict each other may both
stand there. `opt-175b` is of weights that are not on the hub. A source is given as far as it is known.

Left out are the table often quoted for LLaMA-7B at 50% (magnitude 8.45, SparseGPT 6.32), for which no source was found
and which contradicts the published one (17.29, 7.22); and figures of what no method and pattern here stand for (ALPS
itself, sparsity by OWL). That of LLaMA-2 at context 4096 (dense 5.12) is in, with its context.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sparselab import files

DENSE = "dense"
# Calibration draws move SparseGPT at 50% by about 0.5%, one standard deviation, so that two draws are 0.7% apart: three
# times that. The dense model has nothing drawn in it.
TOLERANCE, DENSE_TOLERANCE = 0.02, 0.005
AGREES, DIFFERS, ORDER_ONLY, NOT_COMPARABLE = "agrees", "differs", "order only", "not comparable"

Row = dict[str, Any]
_NOTHING: Row = {"published": math.nan, "uncertainty": math.nan, "difference": math.nan, "verdict": "", "source": ""}


class Figure(NamedTuple):
    """A perplexity that somebody has published.

    Args:
        model: its id on the hub.
        method: a key of `sparselab.methods.METHODS`, or "dense".
        pattern: "50%" or "2:4"; "" of the dense model.
        dataset: the evaluation text, all of it, as in the papers; see `sources.PAPERS`.
        perplexity, uncertainty: as published; None where no uncertainty is stated.
        seqlen: tokens a window.
        calibration, nsamples: text and windows; "" and None where the method reads none.
        source: the paper.
    """

    model: str
    method: str
    pattern: str
    dataset: str
    perplexity: float
    uncertainty: float | None
    seqlen: int
    calibration: str
    nsamples: int | None
    source: str


@dataclass(frozen=True)
class Protocol:
    """How one's own perplexities were measured.

    Args:
        seqlen: tokens a window.
        calibration, nsamples: text and windows.
        eval_nsamples: evaluation windows; None is all of them.
    """

    seqlen: int = 2048
    calibration: str = "c4"
    nsamples: int = 128
    eval_nsamples: int | None = None

    def differences(self, figure: Figure) -> str:
        """In what a figure was measured otherwise, in words; empty if in nothing."""
        pairs: list[tuple[str, Any, Any]] = [("seqlen", self.seqlen, figure.seqlen)]
        if self.eval_nsamples is not None:
            pairs.append(("evaluation windows", self.eval_nsamples, "all"))
        if figure.calibration:
            pairs.append(("calibration text", self.calibration, figure.calibration))
            pairs.append(("calibration windows", self.nsamples, figure.nsamples))
        return ", ".join(f"{name} {own} instead of {theirs}" for name, own, theirs in pairs if own != theirs)


def published(model: str | None = None) -> list[Figure]:
    """The published figures of a model, or all of them.

    Args:
        model: compared by the last part of its name, so that the folder `copies/opt-125m` is facebook/opt-125m; that
            it really is, the dense perplexity has to show.
    """
    return [figure for figure in _read() if model is None or _last_part(figure.model) == _last_part(model)]


def beside(measured: Iterable[Row], known: Sequence[Figure], used: Protocol) -> list[Row]:
    """Measured perplexities with the published ones beside them, and what can be concluded.

    Of several figures of the same thing the nearest stands, those measured alike before others. The verdict is

    - "": nothing is published;
    - "not comparable": something was done otherwise, and what; or the dense model differs on this text, which has to be
      explained first;
    - "order only", magnitude: papers do not agree on its figures, so that only its place after the others counts;
    - "agrees": within 2% of a figure, the dense model within 0.5%. The standard error over windows has no part in it,
      as the text is the same;
    - "differs": it is not. The 2% come from calibration draws at 50%. What draws do at higher sparsity and in N:M
      patterns is not published: there, try other seeds before you look for a mistake.

    Args:
        measured: rows with method, pattern, dataset and perplexity; a text's dense row before its others.
        known: of this model, from `published`.
        used: how they were measured.

    Returns:
        The rows with `published` and `uncertainty` (NaN if there are none), `difference` (of the measured one to it, in
        per cent of it), `verdict` and `source`.
    """
    rows, otherwise = [], set()
    for row in measured:
        figure = _nearest(row, known, used)
        if figure is None:
            rows.append(row | _NOTHING)
            continue
        verdict = _verdict(row, figure, used, row["dataset"] in otherwise)
        if row["method"] == DENSE and verdict == DIFFERS:
            otherwise.add(row["dataset"])
        numbers = (figure.perplexity, figure.uncertainty or math.nan, 100 * _excess(row, figure))
        rows.append(row | dict(zip(_NOTHING, (*numbers, verdict, figure.source), strict=True)))
    return rows


def _verdict(row: Row, figure: Figure, used: Protocol, dense_differs: bool) -> str:
    if differences := used.differences(figure):
        return f"{NOT_COMPARABLE}: {differences}"
    if dense_differs:
        return f"{NOT_COMPARABLE}: the dense model differs"
    if figure.method == "magnitude":
        return ORDER_ONLY
    tolerance = DENSE_TOLERANCE if figure.method == DENSE else TOLERANCE
    return AGREES if abs(_excess(row, figure)) <= tolerance else DIFFERS


def _nearest(row: Row, known: Sequence[Figure], used: Protocol) -> Figure | None:
    same = [
        each for each in known if all(getattr(each, name) == row[name] for name in ("method", "pattern", "dataset"))
    ]
    alike = [each for each in same if not used.differences(each)]
    return min(alike or same, key=lambda each: abs(_excess(row, each)), default=None)


def _excess(row: Row, figure: Figure) -> float:
    return float(row["perplexity"]) / figure.perplexity - 1


def _last_part(model: str) -> str:
    return Path(model).name.casefold()


@cache
def _read() -> tuple[Figure, ...]:
    with files.bundled("benchmarks/published.csv").open(encoding="utf-8", newline="") as table:
        return tuple(_figure(row) for row in csv.DictReader(table))


def _figure(row: dict[str, str]) -> Figure:
    given: Row = dict(row) | {"perplexity": float(row["perplexity"]), "seqlen": int(row["seqlen"])}
    for name, number in (("uncertainty", float), ("nsamples", int)):
        given[name] = number(row[name]) if row[name] else None
    return Figure(**given)
