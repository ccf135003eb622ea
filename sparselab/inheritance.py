"""Where a pruned model goes wrong: what each block spoils itself, and what it inherits from the blocks before it."""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparselab.calibration import Stream, enter
from sparselab.errors import NonFiniteError
from sparselab.models.blocks import Decoder, evaluating
from sparselab.models.inputs import check_tokens
from sparselab.progress import Progress, tracked


def block_errors(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokens: Any,
    batch_size: int | None = None,
    progress: Progress = True,
) -> pd.DataFrame:
    """The error of each block's outputs, taken apart: made in the block, and brought in from those before it.

    With f a dense block and x what enters it in the dense model, f̂ and x̂ the same of the pruned one:

        local      ‖f̂(x) − f(x)‖²    the pruned block on inputs without error
        inherited  ‖f(x̂) − f(x)‖²    the dense block on the pruned model's inputs
        total      ‖f̂(x̂) − f(x)‖²    the pruned model

    each summed over all tokens and divided by ‖f(x)‖², summed alike. So `total` says which part of the hidden state is
    wrong where the next block reads it, and errors of different blocks compare by the harm that they do there. The
    denominator is mostly what passes through the block: `added`, which is ‖f(x) − x‖² in the same units, is what the
    block puts into it, and local / added is how badly it does that. The errors do not add up: they may cancel or
    amplify each other, and the pruned block makes its own on other inputs.

    Sums over tokens are dominated by tokens of large norm, which in some large models are the first ones.

    Args:
        dense, pruned: two models of one architecture, each all in memory; neither is changed.
        tokens: windows [n, seqlen], in any form that `prune` takes.
        batch_size: windows at a time; None chooses by the device.
        progress: a bar over blocks; see `sparselab.progress`.

    Returns:
        A row a block: block, local, inherited, total, added; NaN where the dense block sends on nothing but zeros.
        The hidden states of both models are held at one depth, not at all of them.

    Raises:
        ValueError: the models are of different classes, or have weights of other names or shapes; or the tokens do not
            fit them.
        UnsupportedModelError: a model is offloaded, partitioned or streamed.
        NonFiniteError: an output is NaN or infinite; the block is named.
    """
    decoders = [Decoder(dense), Decoder(pruned)]
    for decoder in decoders:
        decoder.check_whole()
    _check_alike(dense, pruned)
    windows = check_tokens(decoders[0], tokens)
    blocks = len(decoders[0].blocks)
    rows = []
    with evaluating(dense), evaluating(pruned), tracked(progress, blocks, "block errors", "block") as advance:
        streams = [enter(decoder, windows, batch_size) for decoder in decoders]
        for index in range(blocks):
            sums = torch.stack([_squares(decoders, index, pair) for pair in zip(*streams, strict=True)]).sum(dim=0)
            if not sums.isfinite().all():
                name = decoders[0].block_prefix(index).removesuffix(".")
                raise NonFiniteError(f"{name}: its outputs are NaN or infinite in one of the models; load it again")
            local, inherited, total, added = (sums[:-1] / sums[-1]).tolist()
            rows.append({"block": index, "local": local, "inherited": inherited, "total": total, "added": added})
            advance(1)
    return pd.DataFrame(rows)


def _check_alike(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    if type(dense) is not type(pruned):
        raise ValueError(
            f"pruned: expected a {type(dense).__name__} as the dense model is, received a {type(pruned).__name__}"
        )
    shapes, others = ({name: tuple(p.shape) for name, p in model.named_parameters()} for model in (dense, pruned))
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            raise ValueError(
                f"pruned: expected {name} of shape {shapes.get(name)} as in the dense model, "
                f"received {others.get(name)}"
            )


def _squares(decoders: list[Decoder], index: int, streams: tuple[Stream, Stream]) -> Float[Tensor, "5"]:
    """Numerators in the order of the columns, and the denominator, of one batch, which moves on past the block."""
    entering = [stream.hidden for stream in streams]

    def sent_on(model: int, inputs: int) -> Float[Tensor, "batch seq hidden"]:
        hidden = entering[inputs].to(entering[model])  # where and as the model calculates
        return decoders[model].run_block(index, hidden, streams[model].calls[index])

    reference = sent_on(0, 0)
    outputs = [sent_on(1, 0), sent_on(0, 1), sent_on(1, 1)]  # local, inherited, total
    streams[0].hidden, streams[1].hidden = reference, outputs[-1]
    exact = reference.double()
    parts = [output.to(exact) - exact for output in [*outputs, entering[0]]]
    return torch.stack([part.square().sum() for part in [*parts, exact]]).cpu()
