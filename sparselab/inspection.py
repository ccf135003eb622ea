"""What a checkpoint holds: zeros and bytes of each layer, and what its manifest says of how it was made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sparselab import files
from sparselab.manifest import Manifest
from sparselab.models import Decoder, stream_weights
from sparselab.models.blocks import find_linears, parameter_of, read_weight
from sparselab.models.checkpoint import checksum
from sparselab.progress import Progress, tracked
from sparselab.replay import printable
from sparselab.solvers.sparsity import NM, groups_beyond
from sparselab.storage import encoded_bytes

_TWO_OF_FOUR = NM(2, 4)
# The tightest first: what is 1:4 is 2:4, and what is 2:4 is 4:8.
_PATTERNS = (NM(1, 4), _TWO_OF_FOUR, NM(4, 8))
_FORMS = ["dense", "bitmask", "2:4"]
# Of whatever command, in the order in which a reader asks for them.
_SETTINGS = ("model", "method", "sparsity", "wbits", "percdamp", "dataset", "nsamples", "seqlen", "seed")
_VERSIONS = ("sparselab", "torch", "transformers")


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint; printed, it is a table, totals, and a few lines of the manifest.

    Args:
        layers: one row a prunable layer: block, layer, d_out, d_in, sparsity (realised), pattern (the tightest of 1:4,
            2:4 and 4:8 that holds in every group of every row; empty if none does), beyond_2_4 (in how many of its
            groups of four more than two weights are left; missing where four does not divide d_in), and bytes: dense,
            bitmask, and 2:4, missing where that does not hold. See `storage.encoded_bytes`.
        totals: rows `layers` and `checkpoint`, the latter with embeddings, norms and head: weights, sparsity, and
            bytes: dense; bitmask and 2:4, where every layer that is smaller in that form has it, and all else is dense.
        manifest: what `sparselab.json` beside the weights says; None if there is none.
        sums: what has become of each file whose checksum the manifest has: "same", "changed" or "missing".
    """

    layers: pd.DataFrame
    totals: pd.DataFrame
    manifest: Manifest | None
    sums: dict[str, str]

    @property
    def differing(self) -> list[str]:
        """The files that are not as the checksums say, and what has become of each."""
        return [f"{name} is {state}" for name, state in self.sums.items() if state != "same"]

    def __str__(self) -> str:
        """As a user reads it."""
        shown = self.layers.rename(columns={"beyond_2_4": "beyond 2:4"})
        sizes = list(zip(shown.d_out, shown.d_in, strict=True))
        shown["shape"] = [f"{d_out} × {d_in}" for d_out, d_in in sizes]
        shown["beyond 2:4"] = [
            f"{groups:,} of {d_out * d_in // 4:,}" if groups is not pd.NA and groups else groups
            for groups, (d_out, d_in) in zip(shown["beyond 2:4"], sizes, strict=True)
        ]
        shown = shown[["block", "layer", "shape", "sparsity", "pattern", "beyond 2:4", *_FORMS]]
        totals = self.totals.rename_axis("bytes").reset_index()
        lines = [_table(shown), "", _table(totals), "", *_about(self.manifest), *self._about_files]
        return printable("\n".join(lines))

    @property
    def _about_files(self) -> list[str]:
        if not self.sums:
            return []
        same = len(self.sums) - len(self.differing)
        return ["; ".join([f"{same} of {len(self.sums)} files are as its checksums say", *self.differing])]


def inspect_checkpoint(name: str | Path, *, trust_remote_code: bool = False, progress: Progress = True) -> Inspection:
    """Count the zeros of a checkpoint and the bytes that they would save; one block at a time is in memory.

    Args:
        name: "tiny", a folder with safetensors files, or a hub id; pruned by whomever, or dense. Bytes are those
            of the dtype in its files.
        trust_remote_code: see `load`.
        progress: a bar over blocks; see `sparselab.progress`.

    Raises:
        ModelLoadError: see `stream`; but a tokenizer is not needed.
        UnsupportedModelError: no decoder blocks are found.
    """
    model = stream_weights(name, "cpu", "stored", trust_remote_code=trust_remote_code)
    decoder = Decoder(model)
    rows: list[dict[str, Any]] = []
    rest: list[_Counts] = []
    with tracked(progress, len(decoder.blocks), "inspecting", "block") as advance:
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as block:
                linears = find_linears(block)
                rows += [{"block": index, "layer": own} | _row(read_weight(each)) for own, each in linears.items()]
                layers = {id(parameter_of(each)) for each in linears.values()}
                rest += [_counts(each) for each in block.state_dict(keep_vars=True).values() if id(each) not in layers]
            advance(1)
        rest += [_counts(weight) for _, weight in model.read(model.names(decoder.is_outside))]
    table = pd.DataFrame(rows).astype(dict.fromkeys(["beyond_2_4", "2:4"], "Int64"))
    stamp = files.read_stamp(model.checkpoint.folder)
    return Inspection(table, _totals(table, rest), stamp, _sums(model.checkpoint.folder, stamp))


class _Counts(NamedTuple):
    weights: int
    zeros: int
    nbytes: int


def _counts(weight: Tensor) -> _Counts:
    return _Counts(weight.numel(), weight.numel() - int(weight.count_nonzero()), weight.nbytes)


def _row(weight: Float[Tensor, "d_out d_in"]) -> dict[str, Any]:
    d_out, d_in = weight.shape
    kept = weight != 0
    beyond = {pattern: groups_beyond(kept, pattern) for pattern in _PATTERNS if d_in % pattern.group == 0}
    size, zeros, _ = _counts(weight)
    sizes = encoded_bytes((d_out, d_in), size - zeros, weight.element_size())
    return {
        "d_out": d_out,
        "d_in": d_in,
        "sparsity": zeros / size,
        "pattern": next((str(pattern) for pattern, groups in beyond.items() if not groups), ""),
        "beyond_2_4": beyond.get(_TWO_OF_FOUR, pd.NA),
        "dense": sizes["dense"],
        "bitmask": sizes["bitmask"],
        "2:4": pd.NA if beyond.get(_TWO_OF_FOUR, 1) else sizes["2:4"],
    }


def _totals(layers: pd.DataFrame, rest: list[_Counts]) -> pd.DataFrame:
    """Of the layers, and with all else."""
    weights = layers.d_out * layers.d_in
    forms = {form: layers[form].fillna(layers.dense).clip(upper=layers.dense).sum() for form in _FORMS}
    of_layers = [weights.sum(), (layers.sparsity * weights).sum(), *forms.values()]
    size, zeros, nbytes = (sum(column) for column in zip(*rest, strict=True))
    of_all = [value + more for value, more in zip(of_layers, [size, zeros, *[nbytes] * len(_FORMS)], strict=True)]
    totals = pd.DataFrame([of_layers, of_all], ["layers", "checkpoint"], ["weights", "sparsity", *_FORMS])
    totals["sparsity"] /= totals.weights
    return totals.astype(dict.fromkeys(["weights", *_FORMS], int))


def _sums(folder: Path, stamp: Manifest | None) -> dict[str, str]:
    """Each file by a manifest, which may come from anybody, so that only names in the folder itself are looked up."""
    results = _mapping(stamp, "results")
    said = {**_mapping(results, "checksums"), **_mapping(results, "tables")}
    found = {name: folder / name for name in said if Path(name).name == name}
    return {
        name: "missing" if not path.is_file() else "same" if checksum(path) == said[name] else "changed"
        for name, path in found.items()
    }


def _mapping(holder: Any, name: str) -> dict[str, Any]:
    value = holder.get(name) if isinstance(holder, dict) else None
    return value if isinstance(value, dict) else {}


def _table(table: pd.DataFrame) -> str:
    """With shares as percentages, thousands apart, and nothing where nothing is known."""
    text = table.astype(object).map(_cell)
    text["sparsity"] = [f"{share:.2%}" for share in table.sparsity]
    return text.to_string(index=False)


def _cell(value: Any) -> str:
    if value is pd.NA:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _about(manifest: Manifest | None) -> list[str]:
    """What a manifest says, in a few lines."""
    if manifest is None:
        return [f"no {files.STAMP}: what this was made from is not known"]
    settings, versions, results = (_mapping(manifest, name) for name in ("settings", "versions", "results"))
    asked = manifest.get("line") or f"{manifest['command']}, called from Python"
    lines = [
        f"{files.STAMP}: {asked} ({manifest.get('date', 'no date')})",
        ", ".join(f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None),
        ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
        f"perplexity {measured:.2f}" if isinstance(measured := results.get("perplexity"), float) else "",
    ]
    return [" ".join(line.split()) for line in lines if line]
