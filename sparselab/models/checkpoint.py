"""A model folder's tensors, read by name and a few at a time. Only safetensors: other formats can run code."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparselab import files
from sparselab.errors import ModelLoadError, OutputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The weights in a folder in the Hugging Face layout, in one file or in shards.

    Args:
        folder: holds `model.safetensors`, or shards and their index.

    Raises:
        ModelLoadError: neither is there, the index is damaged or leads out of the folder, a shard is missing, damaged
            or without a tensor that the index says it has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        expected = _listed(folder)
        for name in sorted(set(expected.values())) or [SINGLE]:
            with _opened(folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    self._files[tensor] = name
                    self.shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
        if lost := [name for name, shard in expected.items() if self._files.get(name) != shard]:
            raise ModelLoadError(f"{folder / expected[lost[0]]}: lacks {lost[0]}, which {INDEX} says it holds")

    @property
    def files(self) -> list[Path]:
        """The files that hold weights."""
        return [self.folder / name for name in sorted(set(self._files.values()))]

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of floats; float32 if there is none."""
        found = (tensor.dtype for _, tensor in self.read(self.shapes) if tensor.is_floating_point())
        return next(found, torch.float32)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, on the CPU, as they are stored; a file is open only as long as it is read from.

        Raises:
            ModelLoadError: a file is damaged.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for shard, wanted in by_file.items():
            with _opened(self.folder / shard) as file:
                for name in wanted:
                    yield name, file.get_tensor(name)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors to a file, whole or not at all, and read them back; returns its checksum (SHA-256).

    Raises:
        OutputError: it cannot be written, as on a full disk, or holds other bits than were to be written.
    """
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with files.written_whole(path) as partial:
            save_file(ready, partial, metadata={"format": "pt"})
            _check_written(path, partial, ready)
            return checksum(partial)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({error}); make room, and go on with --resume") from error


def unlike(wanted: Tensor, found: Tensor) -> str:
    """In what a tensor is not, bit for bit, the one that is wanted, in words; empty if in nothing."""
    if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        kinds = (f"{tuple(each.shape)} of {each.dtype}".replace("torch.", "") for each in (wanted, found))
        return "expected {}, received {}".format(*kinds)
    wanted, found = wanted.detach(), found.detach().to(wanted.device)
    bits, others = (each.contiguous().flatten().view(torch.uint8) for each in (wanted, found))
    if torch.equal(bits, others):
        return ""
    values = (bits != others).view(wanted.numel(), -1).any(dim=1).sum()
    zeros = ((wanted == 0) != (found == 0)).sum()
    return f"{values} of {wanted.numel()} values are others, {zeros} of them zero in one of the two"


def write_index(folder: Path, shards: dict[str, dict[str, int]]) -> None:
    """Say which of a folder's shards holds which tensors, of how many bytes: the last file of weights."""
    places = {name: shard for shard, sizes in shards.items() for name in sizes}
    size = sum(sum(sizes.values()) for sizes in shards.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2)
    files.write_text(folder / INDEX, text + "\n")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> dict[str, str]:
    """The index: which file has which tensor. Empty where there is but one file."""
    index = folder / INDEX
    if (folder / SINGLE).exists():  # which transformers prefers, too
        return {}
    if not index.exists():
        raise ModelLoadError(
            f"{folder}: expected {SINGLE} or {INDEX}, found neither; weights in other formats can run code when "
            "they are opened and are not read: save the model again by a current transformers"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(tensor): str(shard) for tensor, shard in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: cannot be read ({type(error).__name__}: {error}); fetch it again") from error
    for shard in set(named.values()):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or path.suffix != ".safetensors":
            raise ModelLoadError(f"{index}: expected .safetensors files below its own folder, received {shard!r}")
    return named


def _check_written(path: Path, written: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(written, framework="pt") as file:
        if (held := set(file.keys())) != tensors.keys():
            raise OutputError(f"{path}: read back, it has other tensors, {sorted(held ^ tensors.keys())[0]} for one")
        for name, tensor in tensors.items():
            if trouble := unlike(tensor, file.get_tensor(name)):
                raise OutputError(
                    f"{path}: {name} read back is not what was written: {trouble}; memory or drive may be faulty: "
                    "go on with --resume, or choose another --out"
                )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error}); fetch it again") from error
