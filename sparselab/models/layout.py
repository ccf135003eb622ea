"""How weights are named and cut in files, and how in the model, where transformers says that these differ.

Mixtral's files, for one, have three matrices for each expert; in the model there are two stacks of all experts'.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class Layout:
    """What transformers' own loading does to names and shapes, for a few weights at a time.

    Args:
        model: whose weights these are; it is told what its files needed, as `from_pretrained` tells it, so that they
            are written as they were read.
        shapes: of the tensors in its files, by name.

    Attributes:
        parts: for each weight of the model, by the name that it has there, the tensors it is made from, in order.
        surplus: tensors that the model has no place for.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes
        self.parts: dict[str, list[str]] = {}
        self.surplus: list[str] = []
        self._converters: dict[str, WeightConverter] = {}
        self._patterns: dict[str, str] = {}
        mapping = get_model_conversion_mapping(model)
        known = model.state_dict(keep_vars=True)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        for stored in sorted(shapes, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if name not in known:  # not to be renamed, it seems, but for the prefix
                name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, known)
            if name not in known:
                self.surplus.append(stored)
                continue
            self.parts.setdefault(name, []).append(stored)
            if pattern is not None:
                self._converters[name], self._patterns[stored] = by_pattern[pattern], pattern
        setattr(model, "_weight_conversions", [each for each in mapping if each.was_used()])  # noqa: B010

    def is_made(self, name: str) -> bool:
        """Whether a weight is made from several tensors, or is another than the one tensor in the files."""
        return name in self._converters

    def made(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """A weight that `is_made`, from its parts by their names in the files."""
        converter: Any = copy.deepcopy(self._converters[name])  # which says that it takes futures, and takes tensors
        for stored in self.parts[name]:
            converter.add_tensor(name, stored, self._patterns[stored], parts[stored])
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        weight: Tensor = made[0] if isinstance(made, list) else made
        return weight

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight as its parts make it."""
        shapes = {stored: self._shapes[stored] for stored in self.parts[name]}
        if not self.is_made(name):
            return shapes[self.parts[name][0]]
        return tuple(self.made(name, {stored: torch.empty(s, device="meta") for stored, s in shapes.items()}).shape)

    def in_files(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their names in the model, as its files have them."""
        stored: dict[str, Tensor] = revert_weight_conversion(self._model, dict(weights))
        return stored

    def in_model(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other way round: out of tensors that `in_files` gave, those in the place of weights (on any device)."""
        found = {}
        for name, weight in weights.items():
            parts = [tensors[part] for part in sorted(self.in_files({name: weight.to("meta")}), key=dot_natural_key)]
            made = self.is_made(name)
            found[name] = self.made(name, dict(zip(self.parts[name], parts, strict=True))) if made else parts[0]
        return found
