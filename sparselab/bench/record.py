"""What `sparselab bench` has measured, as a table to read and a file to keep."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from sparselab.bench.layers import mean_ratio
from sparselab.files import markdown_table


@dataclass(frozen=True)
class Record:
    """One run of the benchmark.

    Args:
        command: what made it.
        machine: see `timing.machine`.
        layers: see `bench_layers`, or None.
        model: see `bench_model`, or None.
        about: the model's name and the size of its calibration text.
        day: when, as in 2026-01-31.
    """

    command: str
    machine: dict[str, Any]
    layers: pd.DataFrame | None = None
    model: pd.DataFrame | None = None
    about: str = ""
    day: str = field(default_factory=lambda: date.today().isoformat())

    def __str__(self) -> str:
        return self._written(lambda table: table.to_string(index=False))

    @property
    def markdown(self) -> str:
        """The same as `str`, as Markdown, below the day and the command."""
        return f"{self.day}, `{self.command}`\n\n{self._written(markdown_table)}\n"

    def _written(self, write: Callable[[pd.DataFrame], str]) -> str:
        parts = [", ".join(f"{name} {value}" for name, value in self.machine.items())]
        if self.layers is not None:
            parts += [write(_layer_table(self.layers)), _mean(self.layers)]
        if self.model is not None:
            parts += [self.about, write(_model_table(self.model))]
        return "\n\n".join(part.removesuffix("\n") for part in parts)

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """What `save` has written."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tables = {name: pd.DataFrame(content[name]) for name in ("layers", "model") if name in content}
        return cls(content["command"], content["machine"], about=content["about"], day=content["date"], **tables)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, seconds and bytes unrounded, and the tables beside it as Markdown."""
        content = {
            "command": self.command,
            "date": self.day,
            "machine": self.machine,
            "about": self.about,
            **{
                name: rows.to_dict("records")
                for name, rows in (("layers", self.layers), ("model", self.model))
                if rows is not None
            },
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        Path(path).with_suffix(".md").write_text(self.markdown, encoding="utf-8")


def _mean(rows: pd.DataFrame) -> str:
    return f"geometric mean of the ratios {mean_ratio(rows):.1f}, lowest {rows.ratio.min():.1f}"


def _layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [f"{d_out}×{d_in}" for d_out, d_in in zip(rows.d_out, rows.d_in, strict=True)],
            "sparsity": rows.sparsity,
            "column loop s": rows.loop_seconds.map("{:.3f}".format),
            "sparselab s": rows.seconds.map("{:.3f}".format),
            "lowest–highest": _spread(rows),
            "ratio": rows.ratio.map("{:.1f}".format),
            "share of floor": rows.share.map("{:.0%}".format),
            "peak MB": (rows.peak_memory / 1e6).map("{:.0f}".format),
            "error/loop's": rows.error.map("{:.4f}".format),
        }
    )


def _model_table(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": rows.run,
            "s": rows.seconds.map("{:.2f}".format),
            "lowest–highest": _spread(rows),
            "over two forwards": rows.over_forwards.map("{:.2f}".format),
            "peak MB": (rows.peak_memory / 1e6).map("{:.0f}".format),
        }
    )


def _spread(rows: pd.DataFrame) -> pd.Series:
    return rows.lowest.map("{:.3f}–".format) + rows.highest.map("{:.3f}".format)
