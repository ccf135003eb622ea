"""A causal language model seen as embed → blocks → head, by replaying its own code, whatever the family.

Nothing here re-implements a forward pass. The blocks are replaced for a moment by pass-throughs that keep the arguments
they were called with (rotary embeddings, masks, cache flags); with these each block can be called alone, in any order,
and hidden states travel from block to block outside the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparselab.errors import UnsupportedModelError
from sparselab.models.experts import Expert, experts_of, is_router, stacks
from sparselab.models.residence import Residence, residence_of
from sparselab.models.streamed import StreamedModel
from sparselab.models.zero import whole_shape

Linear = nn.Linear | Conv1D | Expert


class Call(NamedTuple):
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Decoder:
    """A causal language model taken apart at its decoder blocks; the model itself is left as it is.

    Weights are looked at only inside of `block`, for those of one block, and `outside`, for all others: those of a
    model that is streamed, offloaded or partitioned among processes are nowhere else.

    Args:
        model: any `transformers` causal language model whose blocks are one `nn.ModuleList`, wherever its weights are.

    Raises:
        TypeError: not a `transformers` model.
        UnsupportedModelError: no such list is found, or no head after it.
    """

    def __init__(self, model: PreTrainedModel | StreamedModel) -> None:
        self.streamed = model if isinstance(model, StreamedModel) else None
        self.model: PreTrainedModel = model.model if isinstance(model, StreamedModel) else model
        self.blocks_name, self.blocks = _find_blocks(self.model)
        self.backbone = _parent(self.model, self.blocks_name)
        self.residence: Residence | StreamedModel = self.streamed or residence_of(self.model)
        self._returns_tuple: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids must lie below it."""
        return whole_shape(cast(nn.Embedding, self.model.get_input_embeddings()).weight)[0]

    @property
    def positions(self) -> int | None:
        """The longest context the model's configuration allows, in tokens; None if it states none."""
        stated: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return stated if stated and stated > 0 else None  # XLNet says -1

    @property
    def device(self) -> torch.device:
        """Where token ids have to lie: the device of the input embedding."""
        return self.residence.device

    @contextmanager
    def block(self, index: int, write_back: bool = False) -> Iterator[nn.Module]:
        """A block with its weights in place; `write_back`: what is done to them lasts."""
        with self.residence.present(lambda name: name.startswith(self.block_prefix(index)), write_back):
            yield self.blocks[index]

    @contextmanager
    def outside(self, head: bool = True) -> Iterator[None]:
        """All weights in place but those of the blocks, and of the head if it is not asked for."""
        with self.residence.present(lambda name: self.is_outside(name) and (head or not self._is_head(name))):
            yield

    def is_outside(self, name: str) -> bool:
        """Whether a weight is part of no block."""
        return not name.startswith(f"{self.blocks_name}.")

    def _is_head(self, name: str) -> bool:
        return _parent(self.model, name) is self.model.get_output_embeddings()

    def block_prefix(self, index: int) -> str:
        """What the names of a block's weights begin with."""
        return f"{self.blocks_name}.{index}."

    def linears(self) -> dict[str, Linear]:
        """Every prunable layer of the model by its full name, block after block."""
        return {
            f"{self.blocks_name}.{index}.{name}": linear
            for index, block in enumerate(self.blocks)
            for name, linear in find_linears(block).items()
        }

    def layers(self) -> list[tuple[int, str]]:
        """Index of the block, and name in it, of every prunable layer."""
        return [(index, name) for index, block in enumerate(self.blocks) for name in find_linears(block)]

    def check_prunable(self) -> None:
        """Raise UnsupportedModelError where blocks keep matrices that are neither linear layers nor known experts."""
        for name, module in self.blocks.named_modules(prefix=self.blocks_name):
            for own, parameter in module.named_parameters(recurse=False):
                shape = whole_shape(parameter)
                vector = shape.numel() == max(shape, default=1)  # RWKV keeps some as [1, 1, d]
                known = own in stacks(module) or isinstance(module, nn.modules.conv._ConvNd)
                if len(shape) >= 3 and not vector and not known:
                    raise UnsupportedModelError(
                        f"{name}.{own}: expected weights in linear layers, or experts' in stacks that "
                        f"transformers tells of, received a parameter {tuple(shape)}; such models cannot be pruned yet"
                    )

    def check_whole(self) -> None:
        """Raise UnsupportedModelError where the model's weights are not in memory all the time."""
        if not self.residence.whole:
            raise UnsupportedModelError(
                "expected a model whose weights are all in memory, received one that is offloaded, partitioned among "
                "processes or streamed; prune, collect and perplexity can work with it"
            )

    def embed(self, input_ids: Int[Tensor, "batch seq"]) -> tuple[Float[Tensor, "batch seq hidden"], list[Call]]:
        """Run everything before block 0, and record what each block would be called with.

        Returns:
            The hidden states that enter block 0, and one `Call` per block.
        """
        entering: list[Tensor] = []
        calls: list[Call] = []
        first_block = self.blocks[0].forward

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_hidden(args, kwargs)
            if index == 0:
                entering.append(hidden)
                if self._returns_tuple is None:
                    # A pass-through has to answer as the block does, and some answer with a tuple: one real call tells.
                    self._returns_tuple = isinstance(first_block(*args, **kwargs), tuple)
            calls.append(call)
            return self._as_block_output(hidden)

        with self._blocks_replaced(record), self._replay():
            self.backbone(input_ids=input_ids.to(self.device), use_cache=False)
        if len(calls) != len(self.blocks):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: expected one call to each of the {len(self.blocks)} blocks in "
                f"{self.blocks_name}, received {len(calls)}; models that skip or repeat blocks are not supported"
            )
        return entering[0], calls

    def run_block(
        self, index: int, hidden: Float[Tensor, "batch seq hidden"], call: Call
    ) -> Float[Tensor, "batch seq hidden"]:
        """Call one block with recorded arguments; returns the hidden states it sends on."""
        with self._replay():
            output = self.blocks[index](hidden, *call.args, **call.kwargs)
        sent_on: Tensor = output[0] if isinstance(output, tuple) else output
        return sent_on

    def head(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Everything after the last block: final norm, projection to the vocabulary, the model's own soft caps.

        The model's forward is run with all blocks passed over, the last one answering with the given hidden states.
        """
        batch, seq, _ = hidden.shape
        any_ids = torch.zeros(batch, seq, dtype=torch.long, device=self.device)

        def answer(_index: int, *_args: Any, **_kwargs: Any) -> Any:
            return self._as_block_output(hidden)

        with self._blocks_replaced(answer):
            logits: Tensor = self.model(input_ids=any_ids, use_cache=False).logits
        return logits

    def forward(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the model's own forward, with nothing replayed; weights are fetched block by block if need be."""
        own = [block.forward for block in self.blocks]

        def fetched(index: int, *args: Any, **kwargs: Any) -> Any:
            with self.block(index):
                return own[index](*args, **kwargs)

        with nullcontext() if self.residence.whole else self._blocks_replaced(fetched), self.outside():
            logits: Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    @contextmanager
    def _replay(self) -> Iterator[None]:
        # A model that passes its blocks other things than hidden states, or asks other things back, trips over it.
        try:
            yield
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: expected a model that passes hidden states from block to block of "
                f"{self.blocks_name}, and nothing else; received {type(error).__name__}: {error}"
            ) from error

    def _as_block_output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        # On the instance, so that attributes the model reads from its blocks stay; what was there (accelerate's
        # hooks) is put back.
        saved = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = partial(forward, index)
        try:
            yield
        finally:
            for block, original in zip(self.blocks, saved, strict=True):
                del block.__dict__["forward"]
                if original is not None:
                    block.__dict__["forward"] = original


def find_linears(block: nn.Module) -> dict[str, Linear]:
    """What can be pruned in a block by name: linear layers and experts but no routers, in the order of definition."""
    found: dict[str, Linear] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not is_router(_parent(block, name), module):
            found[name] = module
        found |= {f"{name}.{own}": expert for own, expert in experts_of(module).items()}
    return found


def parameter_of(linear: Linear) -> Tensor:
    """The parameter that holds a layer's weight: of an expert, the stack that it is a slice of."""
    return linear.stack if isinstance(linear, Expert) else linear.weight


def weight_shape(linear: Linear) -> tuple[int, int]:
    """(d_out, d_in) of the layer's weight, wherever that is."""
    rows, columns = whole_shape(parameter_of(linear))[-2:]
    transposed = linear.transposed if isinstance(linear, Expert) else isinstance(linear, Conv1D)
    return (columns, rows) if transposed else (rows, columns)


def read_weight(linear: Linear) -> Float[Tensor, "d_out d_in"]:
    """The layer's weight as [d_out, d_in], not a copy; transposed storage (`Conv1D`, some experts) is undone."""
    weight = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def write_weight(linear: Linear, weight: Float[Tensor, "d_out d_in"]) -> None:
    """Put values into the layer's weight in place, whatever its storage, dtype and device."""
    with torch.inference_mode(parameter_of(linear).is_inference()):  # such tensors can be changed nowhere else
        read_weight(linear).copy_(weight)


def _parent(module: nn.Module, name: str) -> nn.Module:
    """What holds a submodule or weight of that name."""
    return module.get_submodule(name.rpartition(".")[0])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's own training flag is put back afterwards.

    Inference mode is left too: its tensors count no changes, and layers that share an input are told by that.
    """
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, received {type(model).__name__}")
    config = model.config.get_text_config()
    wanted = getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and find_linears(module)
    ]
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None or not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a causal language model whose {wanted} decoder blocks are one "
            "nn.ModuleList of modules with linear layers, and a head; found no such thing"
        )
    return max(found, key=lambda item: sum(whole_shape(parameter).numel() for parameter in item[1].parameters()))


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], Call((), others)
