"""Models that DeepSpeed ZeRO-3 has partitioned among processes: each holds a piece of every weight for all.

DeepSpeed is the extra `scale`; it is imported only where a model is partitioned or has been.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.errors import ModelLoadError
from sparselab.models.streamed import StreamedModel
from sparselab.ranks import lost_rank_told


class PartitionedModel(StreamedModel):
    """A streamed model whose weights, once `fill` has read them, lie in the processes' memory, a piece in each.

    All processes have to do alike: make it with the same arguments, fill it, and enter `present` in the same order.

    Args, Attributes: see `StreamedModel`.
    """

    collective = True

    def fill(self) -> None:
        """Read every weight once, by the first process, and partition it among all.

        Raises:
            ModelLoadError: DeepSpeed is not installed or cannot start, there are no other processes, it works on
                another device than the model, or a file is damaged.
            LostRankError: another process has ended.
        """
        deepspeed = _started(self.device)
        first = torch.distributed.get_rank() == 0
        for name, absent in self.absent.items():
            buffer = not isinstance(absent, nn.Parameter)
            with lost_rank_told():
                read = first or buffer
                tensor = next(self.read([name]))[1] if read else torch.empty_like(absent, device=self.device)
                self._put(name, tensor if buffer else _partitioned(tensor, deepspeed))

    @contextmanager
    def present(self, wanted: Callable[[str], bool], write_back: bool = False) -> Iterator[None]:
        """Weights whose names are wanted are whole inside, in every process.

        Args:
            wanted: by name.
            write_back: let what is done to them, the same in all processes, last.

        Raises:
            LostRankError: another process has ended.
        """
        with gathered(map(self.weight, self.names(wanted)), write_back):
            yield


@contextmanager
def gathered(parameters: Iterable[Tensor], write_back: bool) -> Iterator[None]:
    """Partitioned weights are whole inside, in every process; see `PartitionedModel.present`."""
    import deepspeed

    gathering = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write_back else None)
    with lost_rank_told():
        gathering.__enter__()
    sound = False
    try:
        yield
        sound = True
    finally:
        if not sound:
            gathering.src_rank = None  # with an error to tell, this process does not wait for the others
        with lost_rank_told():
            gathering.__exit__(None, None, None)


@contextmanager
def without_engine(model: nn.Module) -> Iterator[None]:
    """No hooks of an engine that runs the model: these gather and let go of weights by a schedule of their own."""
    kinds = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    saved = [(hooks, dict(hooks)) for hooks in kinds if any(map(_of_deepspeed, hooks.values()))]
    for hooks, all_of_them in saved:
        for key, hook in all_of_them.items():
            if _of_deepspeed(hook):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, all_of_them in saved:
            hooks.clear()
            hooks.update(all_of_them)


def _of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed has partitioned a model's weights among processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def has_optimizer(model: nn.Module) -> bool:
    """Whether DeepSpeed trains a partitioned model, and so holds weights in float32 besides the model's own."""
    return any(hasattr(parameter, "_z3_optimizer") for parameter in model.parameters())


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a weight, though this process may have but a piece of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _started(device: torch.device) -> Any:
    """DeepSpeed, once its processes are in touch."""
    if not torch.distributed.is_initialized() or "LOCAL_RANK" not in os.environ:
        raise ModelLoadError("--zero: expected several processes to share the model; start them with torchrun")
    try:
        import deepspeed
    except ImportError as error:
        raise ModelLoadError("--zero: needs DeepSpeed; install it with pip install 'sparselab[scale]'") from error
    try:
        with redirect_stdout(StringIO()):  # it tells what it has compiled
            deepspeed.init_distributed(verbose=False)
    except (ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0][:100]
        raise ModelLoadError(f"--zero: DeepSpeed cannot start ({why}); on a CPU it needs the compiler g++") from error
    its = torch.device(deepspeed.accelerator.get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if device != its:
        raise ModelLoadError(
            f"--zero: expected {its}, where DeepSpeed works in this process, received --device {device}; leave that "
            "out, or set DS_ACCELERATOR=cpu to work on the CPU"
        )
    return deepspeed


def _partitioned(tensor: Tensor, deepspeed: Any) -> nn.Parameter:
    holder = nn.ParameterList([nn.Parameter(tensor, requires_grad=False)])
    # It would put its own linear function, which rounds otherwise, in the place of torch's for the whole program.
    deepspeed.zero.Init(module=holder, mem_efficient_linear=False)
    parameter: nn.Parameter = holder[0]
    return parameter
