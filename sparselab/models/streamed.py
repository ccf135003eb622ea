"""A model whose weights stay in their files, but for the part that is being used."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparselab.errors import ModelLoadError
from sparselab.models.checkpoint import Checkpoint
from sparselab.models.layout import Layout

# What files of older versions hold besides, as transformers has it for all models.
_MADE_BY_THE_MODEL = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


class Misfit(NamedTuple):
    """In what the weights in the files are not those that the model needs; see `StreamedModel`."""

    missing: list[str]
    surplus: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


class StreamedModel:
    """A causal language model built without weights, and the files that have them.

    Args:
        checkpoint: the weights.
        device: where they are needed.
        dtype: of the weights; None is what the configuration says, or the files if that says nothing.
        trust_remote_code: whether the model may be made by code in the checkpoint's folder.

    Raises:
        ModelLoadError: two weights that the configuration makes one are different in the files.

    Attributes:
        model: its weights are on the meta device, outside of `present`.
        misfit: names of the model that the files lack, names in the files that the model has no place for, and (name,
            shape in the files, shape in the model) of those that do not fit. All empty for a model that can be used.
        absent: every weight by its first name, on the meta device.
        layout: how the files have the weights.
        name: what the user calls the model; empty if nobody has said.
        whole, collective: see `Residence`.
    """

    whole, collective = False, False

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint, self.device, self.name = checkpoint, device, ""
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        dtype = dtype or config.dtype or checkpoint.dtype
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
        for name, weight in self.model.state_dict(keep_vars=True).items():
            if weight.is_floating_point() and _stays_float32(self.model, name, dtype):
                weight.data = weight.data.float()
        self.model.tie_weights()  # anew, as what made them empty has parted them
        for module in self.model.modules():  # tables of angles and masks, which no file has
            module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
        # Every weight by its first name, with all the names that it has: a head may be the embedding once more.
        self._aliases: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            self._aliases.setdefault(first.setdefault(id(tensor), name), []).append(name)
        self.absent = {name: self.weight(name) for name in self._aliases}
        self.layout = Layout(self.model, checkpoint.shapes)
        self._sources, self.misfit = self._matched()

    def names(self, wanted: Callable[[str], bool]) -> list[str]:
        """First names of the weights that are wanted under any of their names."""
        return [name for name, aliases in self._aliases.items() if any(map(wanted, aliases))]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Weights by first name, one after the other, in the model's dtype on its device; copies, not views of files.

        Raises:
            ModelLoadError: a file is damaged.
        """
        names = list(names)
        made = [name for name in names if self.layout.is_made(self._sources[name])]
        whole = {self.layout.parts[self._sources[name]][0]: name for name in names if name not in made}
        found = ((whole[stored], tensor) for stored, tensor in self.checkpoint.read(whole))
        for name, tensor in chain(found, ((name, self._made(self._sources[name])) for name in made)):
            yield name, tensor.to(device=self.device, dtype=self.absent[name].dtype, copy=True)

    def _made(self, alias: str) -> Tensor:
        return self.layout.made(alias, dict(self.checkpoint.read(self.layout.parts[alias])))

    @contextmanager
    def present(self, wanted: Callable[[str], bool], write_back: bool = False) -> Iterator[None]:
        """Weights whose names are wanted are in their places inside, and gone after it with all that was done to them.

        Args:
            wanted: by name.
            write_back: refused; see `check_write_back`.

        Raises:
            ModelLoadError: a file is damaged.
        """
        if write_back:
            self.check_write_back(wanted)
        names = self.names(wanted)
        try:
            for name, tensor in self.read(names):
                self._put(name, tensor)
            yield
        finally:
            for name in names:
                self._put(name, self.absent[name])

    @contextmanager
    def instead(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values, by first name, in the places of weights inside; what was in these is back after it."""
        before = {name: self.weight(name) for name in weights}
        try:
            for name, tensor in weights.items():
                self._put(name, tensor)
            yield
        finally:
            for name, tensor in before.items():
                self._put(name, tensor)

    def check_write_back(self, wanted: Callable[[str], bool]) -> None:  # noqa: ARG002
        """Raise ValueError: the files are only read."""
        raise ValueError(
            "model: expected one that can be changed in place, received one that is streamed from files; "
            "prune_checkpoint prunes it to other files, and load opens it whole"
        )

    def _matched(self) -> tuple[dict[str, str], Misfit]:
        """By which of its names the files have each weight, and what does not fit."""
        known = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        sources: dict[str, str] = {}
        misfit = Misfit([], [stored for stored in self.layout.surplus if not self._may_be_left(stored)], [])
        for alias, parts in self.layout.parts.items():
            name = known[alias]
            stored = [self.layout.parts[sources[name]][0]] if name in sources else []
            if not self.layout.is_made(alias) and len(stored := stored + parts) > 1:
                self._check_equal(stored)
            sources[name] = alias
            if (found := self.layout.shape(alias)) != (expected := tuple(self.absent[name].shape)):
                misfit.mismatched.append((name, found, expected))
        misfit.missing.extend(name for name in self._aliases if name not in sources)
        return sources, misfit

    def _check_equal(self, stored: list[str]) -> None:
        tensors = dict(self.checkpoint.read(stored))
        for name in stored[1:]:
            if not torch.equal(tensors[stored[0]], tensors[name]):
                raise ModelLoadError(
                    f"{stored[0]} and {name} are one weight by config.json and different ones in the files; "
                    "set tie_word_embeddings to false there if both are meant"
                )

    def _may_be_left(self, stored: str) -> bool:
        """Whether the model makes this tensor itself, or says that old files hold it for nothing."""
        ignored = [*_MADE_BY_THE_MODEL, *(self.model._keys_to_ignore_on_load_unexpected or ())]
        prefix = f"{self.model.base_model_prefix}."
        spellings = {stored, prefix + stored, stored.removeprefix(prefix)}
        made = not spellings.isdisjoint(name for name, _ in self.model.named_buffers())
        return made or any(re.search(pattern, spelling) for pattern in ignored for spelling in spellings)

    def nbytes(self, name: str) -> int:
        """Size of a weight when it is present."""
        return self.absent[name].nbytes

    def weight(self, name: str) -> Tensor:
        """A weight by its name, as it is now: only of use where it is present."""
        parent, _, own = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(parent), own)
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        buffer = not isinstance(self.weight(name), nn.Parameter)
        value = tensor if buffer or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        for alias in self._aliases[name]:
            parent, _, own = alias.rpartition(".")
            setattr(self.model.get_submodule(parent), own, value)


def _stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether the model's authors say that a weight needs it, as `from_pretrained` understands them."""
    always = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else None
    rather_than_half = model._keep_in_fp32_modules if dtype == torch.float16 else None
    patterns = [*(always or ()), *(rather_than_half or ())]
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
