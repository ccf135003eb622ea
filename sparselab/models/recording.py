"""What enters each linear layer of a block, summed as it passes; layers that see one tensor share one sum."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.errors import SparselabError, UnsupportedModelError, naming
from sparselab.models.blocks import Call, Linear, find_linears, weight_shape
from sparselab.models.experts import Expert, watched
from sparselab.resources import Stopwatch
from sparselab.solvers import InputStatistics


class AllInputsSeen(Exception):  # noqa: N818 - it says that all is well
    """Ends a forward pass of a block of which nothing but the inputs of its linear layers is wanted."""


@contextmanager
def collect_statistics(
    block: nn.Module,
    block_name: str,
    with_hessian: bool,
    inputs_only: bool = False,
    watch: Stopwatch | None = None,
    only: Collection[str] | None = None,
) -> Iterator[dict[str, InputStatistics]]:
    """Sum up the inputs of a block's linear layers during the forward passes made inside.

    Layers called with the very same tensor (q, k and v; gate and up) get the very same `InputStatistics`, which
    sees each token once. Experts see the tokens that are routed to them, maybe none.

    Args:
        block: the block that is run.
        block_name: for messages.
        with_hessian: see `InputStatistics`.
        inputs_only: end each pass but the first by `AllInputsSeen` as soon as every linear layer has been called as
            often as in the first, before the last call multiplies; not where hooks of `accelerate` move weights, which
            have to run to their end, nor where there are experts, which are not called in every pass.
        watch: counts the summing as stage "statistics".
        only: names of the layers in question; None is all.

    Yields:
        Statistics by layer name, filled while the block runs, in the order in which the layers are called.

    Raises:
        NonFiniteError: an input is NaN or infinite; names the layer.
        UnsupportedModelError: a layer was not called.
        SparselabError: a layer shares its input with others in some passes only.
    """
    linears = {name: linear for name, linear in find_linears(block).items() if only is None or name in only}
    moved = any(hasattr(module, "_hf_hook") for module in block.modules())
    experts = {name: linear for name, linear in linears.items() if isinstance(linear, Expert)}
    collector = _Collector(block_name, linears, with_hessian, watch or Stopwatch(torch.device("cpu")))
    collector.may_stop = inputs_only and not moved and not experts
    hooks = [
        linear.register_forward_pre_hook(partial(collector.called, name), with_kwargs=True)
        for name, linear in linears.items()
        if not isinstance(linear, Expert)
    ]
    hooks.append(block.register_forward_hook(lambda *_: collector.end_pass()))
    try:
        with watched(block, experts, collector.see):
            yield collector.statistics
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name in linears if name not in collector.statistics]
    if experts and not experts.keys() <= set(idle):
        for name in experts.keys() & set(idle):
            collector.start(name, experts[name].stack.device)
        idle = [name for name in idle if name not in experts]
    if idle:
        raise UnsupportedModelError(
            f"{block_name}.{idle[0]}: expected calibration tokens, the layer was never called; "
            "models that use a layer's weight without calling it, or send it none of the tokens, are not supported"
        )


class _Collector:
    def __init__(self, block_name: str, linears: dict[str, Linear], with_hessian: bool, watch: Stopwatch) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.may_stop = False
        # The inputs of the pass under way with the first layer that saw each, and their version, which counts
        # in-place changes; held until the block is done, so that no other tensor takes their place in memory.
        self.seen: list[tuple[Tensor, int | None, str]] = []
        self._calls: Counter[str] = Counter()  # of each layer in the pass under way
        self._whole_pass: Counter[str] | None = None  # and in the first one
        self._block_name, self._linears, self._with_hessian, self._watch = block_name, linears, with_hessian, watch
        self._leaders: dict[str, str] = {}

    def end_pass(self) -> None:
        self.seen.clear()
        self._whole_pass = self._whole_pass or self._calls
        self._calls = Counter()

    def start(self, name: str, device: torch.device) -> None:
        d_in = weight_shape(self._linears[name])[1]
        self.statistics[name] = InputStatistics(d_in, self._with_hessian, device=device)

    def called(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.see(name, args[0] if args else next(iter(kwargs.values())))

    def see(self, name: str, inputs: Tensor) -> None:
        version = None if inputs.is_inference() else inputs._version  # unknown changes: taken for an input of its own
        same = (first for tensor, before, first in self.seen if tensor is inputs and before == version is not None)
        leader = next(same, name)
        if self._leaders.setdefault(name, leader) != leader:
            raise SparselabError(f"{self._block_name}.{name}: shares its input with other layers in some passes only")
        if leader == name:
            self.seen.append((inputs, version, name))
            with self._watch.stage("statistics"):
                self._update(name, inputs)
        self.statistics[name] = self.statistics[leader]
        self._calls[name] += 1
        if self.may_stop and self._calls == self._whole_pass:
            self.end_pass()
            raise AllInputsSeen

    def _update(self, name: str, inputs: Tensor) -> None:
        if name not in self.statistics:
            self.start(name, inputs.device)
        with naming(f"{self._block_name}.{name}"):
            self.statistics[name].update(inputs)


def shared_tensors(calls: list[Call], earlier: list[Call]) -> list[Call]:
    """The same calls, with tensors that equal those of an earlier batch replaced by them, so that one copy is kept."""
    return [
        Call(_share(now.args, before.args), _share(now.kwargs, before.kwargs))
        for now, before in zip(calls, earlier, strict=True)
    ]


def _share(now: Any, before: Any) -> Any:
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        same = now.dtype == before.dtype and now.shape == before.shape and torch.equal(now, before)
        return before if same else now
    if type(now) is tuple and type(before) is tuple and len(now) == len(before):
        return tuple(_share(*pair) for pair in zip(now, before, strict=True))
    if type(now) is dict and type(before) is dict:
        return {key: _share(value, before.get(key)) for key, value in now.items()}
    return now
