"""What a checkpoint holds: zeros layer by layer, patterns that they keep, bytes that they could save, its manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparselab import files, solvers, storage
from sparselab.models.blocks import Decoder, find_linears, read_weight
from sparselab.models.checkpoint import checksum
from sparselab.models.loading import stream
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress, tracked

# Looked for in this order: the first that a layer keeps is named.
PATTERNS = (solvers.NM(1, 4), solvers.NM(2, 4), solvers.NM(4, 8))
_SETTINGS = ("model", "method", "sparsity", "percdamp", "dataset", "nsamples", "seqlen", "seed")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Args:
        name: as the user wrote it.
        layers: a row for each prunable layer: block, layer, d_out, d_in; sparsity (realised); pattern (the first of
            1:4, 2:4 and 4:8 that it keeps in every group; empty if none); crowded (groups of four that keep more than
            two; −1 where d_in is no multiple of four); dense, bitmask and two_of_four (bytes in the dtype of the files;
            of the last −1 where it does not keep 2:4).
        file_bytes: of all files with weights: the layers, embeddings, norms and head.
        manifest: of the folder; None if it has none.
        damaged: names of files that are not as the manifest's checksums say.
    """

    name: str
    layers: pd.DataFrame
    file_bytes: int
    manifest: dict[str, Any] | None
    damaged: list[str]

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that are zero."""
        sizes = self.layers.d_out * self.layers.d_in
        return float((self.layers.sparsity * sizes).sum() / sizes.sum())

    @property
    def totals(self) -> pd.DataFrame:
        """Bytes of the layers, and of the files: as they are, and if each layer took the form that is smallest for it.

        Rows dense, bitmask and 2:4; columns layers and files. A layer that is larger in a form, or cannot have it, is
        dense there.
        """
        dense = self.layers.dense
        others = {"dense": dense, "bitmask": self.layers.bitmask, "2:4": self.layers.two_of_four}
        least = {form: int(sizes.where(sizes.between(0, dense), dense).sum()) for form, sizes in others.items()}
        rest = self.file_bytes - int(dense.sum())
        return pd.DataFrame(
            {"layers": least, "files": {form: size + rest for form, size in least.items()}}, index=list(least)
        )

    @property
    def table(self) -> pd.DataFrame:
        """The layers as text to print."""
        shown = self.layers
        keys = ["dense", "bitmask", "two_of_four"]
        numbers = {key: shown[key].map(lambda size: f"{size:,}" if size >= 0 else "") for key in keys}
        about = {
            "shape": shown.d_out.astype(str) + " × " + shown.d_in.astype(str),
            "sparsity": shown.sparsity.map("{:.2%}".format),
            "crowded": shown.crowded.map(lambda count: f"{count:,}" if count >= 0 else ""),
        }
        columns = ["block", "layer", "shape", "sparsity", "pattern", "crowded", *keys]
        return shown.assign(**about, **numbers)[columns].rename(columns={"two_of_four": "2:4"})

    def __str__(self) -> str:
        lines = [self.table.to_string(index=False), ""]
        lines.append(f"{self.name}: {self.sparsity:.2%} zeros in {len(self.layers)} layers; megabytes of its files")
        for form, layers, whole in self.totals.itertuples(name=None):
            share = "as they are" if form == "dense" else f"{whole / self.file_bytes:.0%}"
            lines.append(f"  {form:8}{whole / 1e6:10.2f}, {share}; the layers alone {layers / 1e6:.2f}")
        return "\n".join([*lines, *self._made()])

    def _made(self) -> list[str]:
        """What the manifest says."""
        if self.manifest is None:
            return [f"no {files.STAMP}: how it was made is not known"]
        settings, versions = self.manifest.get("settings", {}), self.manifest.get("versions", {})
        said = [f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
        lines = [f"made by {self.manifest.get('line') or self.manifest['command']}"]
        lines.append(f"  on {self.manifest.get('date', 'a day that is not known')}: {', '.join(said)}")
        lines.append("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
        sums = _checksums(self.manifest)
        state = f"{', '.join(self.damaged)} changed since" if self.damaged else "as they were written"
        return [*lines, f"  {len(sums)} files of weights, {state}" if sums else "  no checksums of its files"]


def inspect_checkpoint(name: str | Path, *, trust_remote_code: bool = False, progress: Progress = True) -> Inspection:
    """Read a checkpoint block by block and count.

    Args:
        name: "tiny", a model folder or a hub id, pruned by whatever means, or dense.
        trust_remote_code: see `load`.
        progress: a bar over blocks.

    Raises:
        ModelLoadError, ValueError: see `stream`.
        UnsupportedModelError: no model whose layers can be pruned.
    """
    streamed, _ = stream(name, "cpu", trust_remote_code=trust_remote_code)
    if (stored := streamed.checkpoint.dtype) != streamed.model.dtype:  # bytes are those of the files
        streamed, _ = stream(name, "cpu", stored, trust_remote_code=trust_remote_code)
    folder, manifest = streamed.checkpoint.folder, files.read_stamp(streamed.checkpoint.folder)
    sums = _checksums(manifest or {})
    damaged = [file for file, digest in sums.items() if not _intact(folder / file, digest)]
    size = sum(path.stat().st_size for path in streamed.checkpoint.files)
    return Inspection(str(name), _layers(streamed, progress), size, manifest, damaged)


def _layers(streamed: StreamedModel, progress: Progress) -> pd.DataFrame:
    decoder, rows = Decoder(streamed), []
    decoder.check_prunable()
    with torch.no_grad(), tracked(progress, len(decoder.blocks), "inspect", "block") as advance:
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as block:
                for layer, linear in find_linears(block).items():
                    rows.append({"block": index, "layer": layer} | _row(read_weight(linear)))
            advance(1)
    return pd.DataFrame(rows)


def _row(weight: Float[Tensor, "d_out d_in"]) -> dict[str, Any]:
    crowded = {
        str(pattern): storage.crowded_groups(weight, pattern)
        for pattern in PATTERNS
        if weight.shape[1] % pattern.group == 0
    }
    two_of_four = str(storage.TWO_OF_FOUR)
    keeps = crowded.get(two_of_four) == 0
    return {
        "d_out": weight.shape[0],
        "d_in": weight.shape[1],
        "sparsity": solvers.realised_sparsity(weight),
        "pattern": next((pattern for pattern, groups in crowded.items() if not groups), ""),
        "crowded": crowded.get(two_of_four, -1),
        "dense": storage.encoded_bytes(weight, "dense"),
        "bitmask": storage.encoded_bytes(weight, "bitmask"),
        "two_of_four": storage.encoded_bytes(weight, two_of_four) if keeps else -1,
    }


def _checksums(manifest: dict[str, Any]) -> dict[str, str]:
    results = manifest.get("results")
    sums = results.get("checksums") if isinstance(results, dict) else None
    return sums if isinstance(sums, dict) else {}


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and checksum(path) == digest
