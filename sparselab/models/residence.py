"""Where the weights of a loaded model lie, and how those that are needed come to be in their places."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, offload_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselab.files import check_space
from sparselab.models.zero import gathered, is_partitioned, without_engine

Wanted = Callable[[str], bool]


class Residence:
    """Weights that are in their places all the time; subclasses tell of those that are not.

    Args:
        model: whose weights.

    Attributes:
        whole: whether weights are in their places all the time.
        collective: whether processes need each other to have a weight whole.
    """

    whole, collective = True, False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def device(self) -> torch.device:
        """Of the input embedding."""
        return _embedding(self._model).weight.device

    @contextmanager
    def present(self, wanted: Wanted, write_back: bool = False) -> Iterator[None]:  # noqa: ARG002
        """Weights whose names are wanted are in their places inside; `write_back`: what is done to them there lasts."""
        yield

    def check_write_back(self, wanted: Wanted) -> None:
        """Raise ValueError or OutputError where what is done to weights could not last."""


def residence_of(model: PreTrainedModel) -> Residence:
    """Where a model's weights lie."""
    if is_partitioned(model):
        return _Partitioned(model)
    return _Offloaded(model) if any(_offloading(module) for module in model.modules()) else Residence(model)


class _Partitioned(Residence):
    """Partitioned among processes by DeepSpeed ZeRO-3."""

    whole, collective = False, True

    @contextmanager
    def present(self, wanted: Wanted, write_back: bool = False) -> Iterator[None]:
        """Gathered from all processes; each of them has to do so."""
        named = self._model.named_parameters(remove_duplicate=False)
        parameters = [parameter for name, parameter in named if wanted(name)]
        with without_engine(self._model), gathered(parameters, write_back):
            yield


class _Offloaded(Residence):
    """Put by accelerate (`device_map`) where there was room: in main memory or on disk, until they are needed."""

    whole = False

    @property
    def device(self) -> torch.device:
        """Of the input embedding when it is used."""
        embedding = _embedding(self._model)
        hook = _offloading(embedding)
        return torch.device(hook.execution_device) if hook else embedding.weight.device

    @contextmanager
    def present(self, wanted: Wanted, write_back: bool = False) -> Iterator[None]:
        """Fetched to the device of their forward, and put back."""
        with ExitStack() as stack:
            for prefix, module in self._model.named_modules():
                hook = _offloading(module)
                if hook and any(wanted(f"{prefix}.{name}") for name, _ in _tensors(module, hook)):
                    stack.enter_context(_fetched(module, hook, write_back))
            yield

    def check_write_back(self, wanted: Wanted) -> None:
        """What lies on disk needs a folder with room: the files of the checkpoint are not touched."""
        needed: dict[Path, int] = defaultdict(int)
        for prefix, module in self._model.named_modules():
            if hook := _offloading(module):
                for name, tensor in _tensors(module, hook):
                    place, key = _place(hook, name)
                    if wanted(f"{prefix}.{name}") and isinstance(place, OffloadedWeightsLoader):
                        folder = _folder(place, key)
                        needed[folder] += 0 if (folder / f"{key}.dat").exists() else tensor.nbytes
        for folder, size in needed.items():
            check_space(folder / "weights", size)


@contextmanager
def _fetched(module: nn.Module, hook: AlignDevicesHook, write_back: bool) -> Iterator[None]:
    with torch.inference_mode(False):
        hook.pre_forward(module)
    hook.offload = False  # or the module's own forward would fetch once more, and let go
    before = {name: _version(tensor) for name, tensor in _tensors(module, hook)}
    try:
        yield
        for name, tensor in _tensors(module, hook) if write_back else ():
            if before[name] is None or before[name] != _version(tensor):
                _store(hook, name, tensor)
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def _store(hook: AlignDevicesHook, name: str, tensor: Tensor) -> None:
    """Put a changed weight where the hook fetches it from."""
    place, key = _place(hook, name)
    if isinstance(place, OffloadedWeightsLoader):
        offload_weight(tensor.detach(), key, place.save_folder, place.index)
    else:
        with torch.no_grad():
            place[key].copy_(tensor)


def _folder(place: OffloadedWeightsLoader, key: str) -> Path:
    """Where a pruned weight would be written, if nothing else lies there."""
    if place.save_folder is None:
        raise ValueError(
            "model: expected a folder for pruned weights that do not fit into memory, received none; "
            "pass offload_folder to from_pretrained"
        )
    folder = Path(place.save_folder)
    if (folder / f"{key}.dat").exists() and place.index[key].get("safetensors_file"):
        raise ValueError(
            f"model: expected an offload_folder of its own, received {folder}, which holds weights of another model; "
            "pass another to from_pretrained"
        )
    return folder


def _place(hook: AlignDevicesHook, name: str) -> tuple[dict[str, Tensor] | OffloadedWeightsLoader, str]:
    """Where a weight lies, and its name there: in main memory, or else on disk."""
    place = hook.weights_map
    if isinstance(place, PrefixedDataset):
        place, name = place.dataset, place.prefix + name
    if isinstance(place, OffloadedWeightsLoader) and name in place.state_dict:
        place = place.state_dict
    return place, name


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that fetches a module's weights for its forward, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)


def _tensors(module: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[str, Tensor]]:
    """What the hook fetches."""
    found: Iterator[tuple[str, Tensor]] = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return found


def _version(tensor: Tensor) -> int | None:
    """Counts changes; None if they cannot be told."""
    return None if tensor.is_inference() else tensor._version
