"""What zeros save on disk: a weight in four forms that really encode and decode, and a whole checkpoint."""

import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparselab import solvers
from sparselab.solvers.sparsity import NM, groups_beyond

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """A weight as buffers that could be written to disk.

    Args:
        form: a key of `FORMS`.
        shape: d_out, d_in.
        parts: the buffers; `values` has the weight's dtype.
    """

    form: str
    shape: tuple[int, int]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(part.nbytes for part in self.parts.values())


def encode(weight: Float[Tensor, "d_out d_in"], form: str) -> Encoded:
    """A weight as the buffers of one of four forms; `encoded_bytes` says how many bytes they are.

    Args:
        weight: [d_out, d_in], any float dtype; what is not zero is kept bit for bit, −0 comes back as 0.
        form: a key of `FORMS`.

    Raises:
        ValueError: an unknown form, or a weight that is not 2:4 in that form: prune it with sparsity "2:4".
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, received {form!r}")
    d_out, d_in = weight.shape
    return Encoded(form, (d_out, d_in), FORMS[form][0](weight.detach()))


def encoded_bytes(shape: tuple[int, int], kept: int, itemsize: int) -> dict[str, int]:
    """Bytes of each form, as `encode` would make it, of a weight that need not be at hand.

    For n entries of b bytes, k of them not zero:

    - dense: n·b
    - bitmask, one bit an entry says whether a value follows: k·b + ⌈n/8⌉
    - 2:4, two values of every four and two bits each for their places: n·b/2 + ⌈n/8⌉
    - CSR, an int32 column a value and an int32 offset a row: k·(b + 4) + 4·(d_out + 1)

    Args:
        shape: d_out, d_in; for 2:4, which the weight has to be, d_in is a multiple of 4.
        kept: entries that are not zero, k.
        itemsize: bytes of an entry, b.
    """
    entries = shape[0] * shape[1]
    bits = -(-entries // 8)
    return {
        "dense": entries * itemsize,
        "bitmask": kept * itemsize + bits,
        "2:4": entries // 2 * itemsize + bits,
        "CSR": kept * (itemsize + 4) + 4 * (shape[0] + 1),
    }


def decode(encoded: Encoded) -> Float[Tensor, "d_out d_in"]:
    """The weight that `encode` was given."""
    return FORMS[encoded.form][1](encoded.parts, encoded.shape)


def storage_table(
    weight: Float[Tensor, "d_out d_in"], patterns: Sequence[str], dtypes: Sequence[torch.dtype]
) -> pd.DataFrame:
    """Bytes of a weight pruned by magnitude, in every form that can hold it, each decoded again.

    Args:
        weight: [d_out, d_in]; converted to each dtype, then pruned.
        patterns: such as "50%" or "2:4"; the form 2:4 is tried on the pattern 2:4 alone.
        dtypes: of the stored values.

    Returns:
        dtype, pattern, sparsity (realised), form, bytes, ratio (to dense), exact (decoded to the same values).
    """
    rows = []
    for dtype in dtypes:
        for pattern in patterns:
            pruned = solvers.magnitude(weight.to(dtype), pattern)
            about: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "pattern": pattern}
            about["sparsity"] = solvers.realised_sparsity(pruned)
            for form in FORMS:
                if form != "2:4" or pattern == "2:4":
                    made = encode(pruned, form)
                    sizes = {"bytes": made.nbytes, "ratio": made.nbytes / pruned.nbytes}
                    rows.append(about | {"form": form} | sizes | {"exact": torch.equal(decode(made), pruned)})
    return pd.DataFrame(rows)


def checkpoint_bytes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a model as a file: safetensors really written, that file through zlib, and with bitmasks instead.

    Args:
        model: its tensors are saved to a temporary folder that is gone afterwards.
        dtype: of the saved floating-point tensors.

    Returns:
        safetensors; zlib (level 1, of that file); bitmask (every matrix for which that is smaller, the rest dense).
    """
    once = {value.data_ptr(): (name, value) for name, value in model.state_dict().items()}  # tied tensors count once
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in once.values()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        sizes = {"safetensors": path.stat().st_size, "zlib": _compressed_size(path)}
    return sizes | {"bitmask": sum(_smaller(value) for value in tensors.values())}


def csr_parts(weight: Float[Tensor, "d_out d_in"]) -> Parts:
    """Compressed sparse rows: values that are not zero, their columns, and where each row begins among them; int32."""
    places = weight != 0
    ends = places.sum(dim=1).cumsum(dim=0)
    columns = places.nonzero()[:, 1]
    return {"rows": torch.cat([ends.new_zeros(1), ends]).int(), "columns": columns.int(), "values": weight[places]}


def _from_csr(parts: Parts, shape: tuple[int, int]) -> Tensor:
    rows = torch.arange(shape[0], device=parts["rows"].device).repeat_interleave(parts["rows"].diff())
    weight = parts["values"].new_zeros(shape)
    weight[rows, parts["columns"]] = parts["values"]
    return weight


def _to_bitmask(weight: Tensor) -> Parts:
    places = weight != 0
    return {"mask": _pack(places.flatten().byte(), 1), "values": weight[places]}


def _from_bitmask(parts: Parts, shape: tuple[int, int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    places = _unpack(parts["mask"], 1, weight.numel()).view(shape).bool()
    weight[places] = parts["values"]
    return weight


def _to_two_of_four(weight: Tensor) -> Parts:
    if weight.shape[1] % 4:
        raise ValueError(f"2:4: expected d_in to be a multiple of 4, received {weight.shape[1]}")
    if full := groups_beyond(weight, NM(2, 4)):
        raise ValueError(
            f'2:4: expected at most two of every four weights, received {full} groups with more; prune with "2:4"'
        )
    groups = weight.reshape(-1, 4)
    # The first two that are not zero; zeros are taken along where there are fewer.
    places = (groups == 0).byte().argsort(dim=1, stable=True)[:, :2].sort(dim=1).values
    return {"places": _pack(places.flatten().byte(), 2), "values": groups.gather(1, places).flatten()}


def _from_two_of_four(parts: Parts, shape: tuple[int, int]) -> Tensor:
    values = parts["values"].view(-1, 2)
    places = _unpack(parts["places"], 2, values.numel()).view(-1, 2).long()
    weight: Tensor = values.new_zeros(len(values), 4).scatter(1, places, values)
    return weight.view(shape)


def _pack(codes: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Small numbers of so many bits each, side by side in bytes, the first in the lowest bits."""
    each = 8 // bits
    padded = torch.cat([codes, codes.new_zeros(-len(codes) % each)]).view(-1, each)
    return (padded << _shifts(codes, bits)).sum(dim=1, dtype=torch.uint8)


def _unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> UInt8[Tensor, " n"]:
    codes: Tensor = (packed[:, None] >> _shifts(packed, bits)) & (2**bits - 1)
    return codes.flatten()[:count]


def _shifts(like: Tensor, bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def _smaller(value: Tensor) -> int:
    """Bytes of a tensor of a checkpoint, as a bitmask if it is a matrix and that is smaller."""
    if value.ndim != 2:
        return value.nbytes
    sizes = encoded_bytes((value.shape[0], value.shape[1]), int(value.count_nonzero()), value.element_size())
    return min(sizes["dense"], sizes["bitmask"])


def _compressed_size(path: Path) -> int:
    packer = zlib.compressobj(level=1)
    with path.open("rb") as file:
        pieces = iter(partial(file.read, 1 << 20), b"")
        return sum(len(packer.compress(piece)) for piece in pieces) + len(packer.flush())


# Name: to buffers, and back.
FORMS: dict[str, tuple[Callable[[Tensor], Parts], Callable[[Parts, tuple[int, int]], Tensor]]] = {
    "dense": (lambda weight: {"values": weight.clone()}, lambda parts, _: parts["values"].clone()),
    "bitmask": (_to_bitmask, _from_bitmask),
    "2:4": (_to_two_of_four, _from_two_of_four),
    "CSR": (csr_parts, _from_csr),
}
