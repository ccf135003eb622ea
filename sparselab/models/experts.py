"""Experts whose matrices transformers stacks in one parameter, each seen as a linear layer of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparselab.models.zero import whole_shape

See = Callable[[str, Tensor], None]
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}  # with inputs first and the weight second


class Expert:
    """One expert's matrix, a slice of the stack that the module keeps.

    Args:
        module: the experts.
        name: of their stack in it, a parameter [experts, d_out, d_in], or [experts, d_in, d_out] if `transposed`.
        index: of the expert.
    """

    def __init__(self, module: nn.Module, name: str, index: int) -> None:
        self._module, self._name, self._index = module, name, index
        self.transposed = bool(module.is_transposed)

    @property
    def stack(self) -> nn.Parameter:
        """All experts' matrices, wherever they are."""
        return cast(nn.Parameter, getattr(self._module, self._name))

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """Its matrix, a view of the stack."""
        weight = self.stack[self._index]
        return weight.T if self.transposed else weight


def stacks(module: nn.Module) -> list[str]:
    """Names of a module's own parameters in which experts' matrices are stacked."""
    # transformers says so of every module whose experts it can run in more than one way
    if getattr(module, "is_transposed", None) is None:
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if len(whole_shape(parameter)) == 3]


def experts_of(module: nn.Module) -> dict[str, Expert]:
    """Each expert of each stack by its name in the module, as `gate_up_proj.0`."""
    return {
        f"{name}.{index}": Expert(module, name, index)
        for name in stacks(module)
        for index in range(whole_shape(getattr(module, name))[0])
    }


def is_router(parent: nn.Module, linear: nn.Module) -> bool:
    """Whether a linear layer beside experts chooses among them, or weighs the one that all tokens see."""
    counts = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList)}
    counts |= {whole_shape(getattr(child, name))[0] for child in parent.children() for name in stacks(child)}
    return bool(counts) and isinstance(linear, nn.Linear) and linear.out_features in {1, *counts}


@contextmanager
def watched(block: nn.Module, experts: Mapping[str, Expert], see: See) -> Iterator[None]:
    """Tell of what enters each expert, by its name, whenever the block runs inside."""
    if not experts:
        yield
        return
    with _one_by_one(block.modules()), _Watch(experts, see):
        yield


@contextmanager
def _one_by_one(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Experts run one after the other, by the model's own code, and not by a kernel that takes them all."""
    configs: list[Any] = list({id(module.config): module.config for module in modules if stacks(module)}.values())
    before = [(config, config._experts_implementation) for config in configs]
    for config in configs:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


class _Watch(TorchFunctionMode):
    """Sees every product with a matrix that is an expert's: there is no module whose call could be hooked."""

    def __init__(self, experts: Mapping[str, Expert], see: See) -> None:
        super().__init__()
        self._names = {expert.weight.data_ptr(): name for name, expert in experts.items()}
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            inputs, weight = (*args, *kwargs.values())[:2]
            if name := self._names.get(weight.data_ptr()):
                self._see(name, inputs)
        return func(*args, **kwargs)
