"""The page of a sweep, in one file that needs nothing else: no server, no network."""

import base64
import html
import json
import time
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparselab import files
from sparselab.figures import png
from sparselab.figures.found import found
from sparselab.progress import in_time
from sparselab.results import SETTING_COLUMNS, TEXT_COLUMNS, failures, read_sweep
from sparselab.sweeps import ABOUT

PAGE, TABLE = "report.html", "results"
_SECONDS_BETWEEN_LOOKS = 5
_SECONDS_BETWEEN_PAGES, _SHARE = 10, 30  # drawing takes at most a thirtieth of the time
_FIRST = ["method", "pattern", "seed", "perplexity", "stderr", "ratio", "relative_error", "seconds", "peak_memory_mb"]
_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(folder: str | Path, where: str = "", under_way: str = "") -> list[Path]:
    """Write the page of a sweep, and its results as tables, into its folder.

    Args:
        folder: where the sweep keeps results.
        where: which of them, see `read_sweep`.
        under_way: how far the sweep is, if it is not done; the page then looks for a newer one of itself every few
            seconds, while nothing is filtered.

    Returns:
        What was written: `report.html`, `results.csv`, and `results.parquet` if pyarrow is installed (extra `sweep`).

    Raises:
        ParameterError: see `read_sweep`.
    """
    place, runs = Path(folder), read_sweep(folder, where)
    about = _about(place)
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        renewed=_SECONDS_BETWEEN_LOOKS if under_way else 0,
        title=html.escape(f"Sweep: {place.resolve().name}"),
        summary=html.escape(_summary(runs, about, where, under_way)),
        figures="\n".join(map(_image, found(runs))) or "<p>None: neither sparsity, damping nor windows vary.</p>",
        failures=_failures(runs),
        table=_table(runs),
        made=html.escape(json.dumps(about, indent=1, ensure_ascii=False) if about else f"not known: no {ABOUT}"),
    )
    files.write_text(place / PAGE, text)
    written = [place / PAGE, place / f"{TABLE}.csv"]
    files.write_text(written[1], runs.to_csv(index=False))
    return [*written, *_parquet(runs, place / f"{TABLE}.parquet")]


class Renewed:
    """The page of a sweep that is under way, written anew when there is something new, but not all the time.

    To be called by `sweep` as its `watch`. As a context manager it writes the last page, whatever ended the sweep.

    Args:
        folder: where the sweep keeps results.
        tell: called with a line if the page cannot be written, which does not stop the sweep.
    """

    def __init__(self, folder: str | Path, tell: Callable[[str], object]) -> None:
        self._folder, self._tell, self._next, self._began = folder, tell, 0.0, 0.0

    def __call__(self, done: int, total: int) -> None:
        """So many runs are done, of so many; the first time, of those that were to do none is."""
        started = time.monotonic()
        if not done:
            self._began = started
        elif started >= self._next:
            left = in_time((started - self._began) / done * (total - done))
            self._write(f"under way, about {left} left")
            taken = time.monotonic() - started
            self._next = started + max(_SECONDS_BETWEEN_PAGES, _SHARE * taken)

    def __enter__(self) -> "Renewed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not kind:
            write_report(self._folder)
        elif self._began and (Path(self._folder) / PAGE).is_file():
            self._write()

    def _write(self, under_way: str = "") -> None:
        try:
            write_report(self._folder, under_way=under_way)
        except (ValueError, OSError) as error:
            self._tell(f"{PAGE} is not written: {error}")


def _about(folder: Path) -> dict[str, Any]:
    """What the sweep says of itself."""
    path = folder / ABOUT
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return about


def _summary(runs: pd.DataFrame, about: dict[str, Any], where: str, under_way: str) -> str:
    of = f" of {about['runs']}" if about.get("runs", 0) > len(runs) and not where else ""
    said = [f"{len(runs)}{of} runs, {len(failures(runs))} of them failed"]
    said += [f"those of {where}"] * bool(where)
    said += [f"{under_way}; this page renews itself while no box below is filled in"] * bool(under_way)
    return "; ".join(said)


def _image(figure: Figure) -> str:
    data = base64.b64encode(png(figure, 110)).decode()
    return f'<figure><img alt="{html.escape(figure.get_supxlabel())}" src="data:image/png;base64,{data}"></figure>'


def _failures(runs: pd.DataFrame) -> str:
    lines = failures(runs)
    if not lines:
        return "<p>None.</p>"
    return "<ul>" + "".join(f'<li class="failed">{html.escape(line)}</li>' for line in lines) + "</ul>"


def _table(runs: pd.DataFrame) -> str:
    """The runs, what differs first, and no column in which there is nothing."""
    rest = [name for name in (*TEXT_COLUMNS, *SETTING_COLUMNS, *runs.columns) if name not in _FIRST]
    shown = runs[list(dict.fromkeys([*_FIRST, *rest]))].dropna(axis="columns", how="all")
    return shown.to_html(index=False, table_id="runs", border=0, na_rep="", float_format=lambda value: f"{value:.6g}")


def _parquet(runs: pd.DataFrame, path: Path) -> list[Path]:
    try:
        with files.written_whole(path) as partial:
            runs.to_parquet(partial, engine="pyarrow")
    except ImportError:
        return []
    return [path]
