"""Masked recovery: a few hundred steps of training for the weights that pruning has kept; the zeros stay zero."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselab.errors import NonFiniteError, SparselabError
from sparselab.models.blocks import Decoder, evaluating, parameter_of
from sparselab.models.inputs import check_tokens
from sparselab.progress import Progress, tracked
from sparselab.solvers.checks import all_finite, as_number, check_whole

Trains = Literal["pruned layers", "all"]
Trained = dict[str, nn.Parameter]  # by the parameter's full name
Masks = dict[str, Bool[Tensor, "_ _"]]  # by the same: True where a weight is pruned, laid out as it is


@dataclass(frozen=True)
class Recovery:
    """What a recovery did, and what it cost.

    Args:
        steps: one row a step: step (from 1), loss (of the step's windows before the step, nats a token),
            learning_rate.
        trained: how many weights were trained; pruned ones are not among them.
        sparsity: of the layers that have zeros, weighted by their size; the same before and after.
        seconds: wall time.
    """

    steps: pd.DataFrame
    trained: int
    sparsity: float
    seconds: float


def recover(
    model: PreTrainedModel,
    tokens: Any,
    steps: int = 200,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    warmup: int | None = None,
    *,
    weight_decay: float = 0.0,
    train: Trains = "pruned layers",
    progress: Progress = True,
) -> Recovery:
    """Train what pruning has kept, in place, by AdamW on the loss of the next token; what it has pruned stays zero.

    Pruned is what is zero now in the prunable layers. The gradient of such a weight is set to zero before the optimizer
    sees it: then its moments stay zero, weight decay leaves it, and every step ends with the mask it began with. At the
    end the mask is held against what it was, weight by weight.

    Dropout plays no part, and no random state but the seed's: a run repeats bit for bit on the same machine. One that
    is interrupted leaves a masked model, as far as it has come. Besides the model it takes four copies of what is
    trained (gradients, two moments, the weights as they were), and the activations of a batch.

    On `tiny` after SparseGPT at 70%, the defaults took held-out perplexity from 16.29 to 13.06 on windows of the text
    that it was trained on. Peaks from 1e-4 to 3e-3 were tried in half the steps with half the windows: 1e-3 and 2e-3
    were the best. Larger models are usually trained with smaller ones.

    Args:
        model: a pruned `transformers` causal language model in float32, all of it in memory. Of weights that were
            rounded while they were pruned (`wbits`) the zeros stay, not the grid.
        tokens: windows [n, seqlen] to train on, in any form that `prune` takes; not those that it is measured on.
        steps: of the optimizer.
        learning_rate: the peak, reached after `warmup` steps; then half a cosine down to zero.
        batch_size: windows a step. All are seen once, in an order drawn with the seed, before any is seen again.
        seed: of that order.
        warmup: steps of linear rise; None is a tenth of all.
        weight_decay: of matrices; vectors have none.
        train: "pruned layers": the weights of the layers that have zeros; "all": embeddings, norms, biases, head and
            unpruned layers too.
        progress: a bar over steps; see `sparselab.progress`.

    Raises:
        ValueError: an argument is wrong, the tokens do not fit the model, nothing is pruned, or weights to train are in
            half precision, where small steps round to none.
        UnsupportedModelError: the model is offloaded, partitioned or streamed.
        NonFiniteError: a loss or a weight is NaN or infinite; the weights are put back as they were.
        SparselabError: the mask has changed; the weights are put back as they were. It takes a kept weight that comes
            to be exactly zero, which is possible and does not happen.
    Source: Loshchilov & Hutter 2019 for AdamW; Han et al. 2015, section 3.3, for training under a fixed mask.
    """
    decoder = Decoder(model)
    decoder.check_whole()
    windows = check_tokens(decoder, tokens)
    _check_arguments(windows, steps, learning_rate, batch_size, seed, warmup, weight_decay, train)
    masks = _masks(decoder)
    trained = _trained(model, masks, train)
    rise = steps // 10 if warmup is None else warmup
    rows, started = [], time.perf_counter()
    with _training(model, trained), tracked(progress, steps, "recover", "step") as advance:
        optimizer = _optimizer(trained, weight_decay)
        for step, chosen in enumerate(_order(len(windows), steps * batch_size, seed).split(batch_size)):
            rate = _learning_rate(step, steps, learning_rate, rise)
            loss = _one_step(model, optimizer, windows[chosen].to(decoder.device), trained, masks, rate)
            rows.append({"step": step + 1, "loss": loss, "learning_rate": rate})
            advance(1)
        _check_result(trained, masks)
    pruned = sum(int(mask.count_nonzero()) for mask in masks.values())
    return Recovery(
        pd.DataFrame(rows),
        sum(parameter.numel() for parameter in trained.values()) - pruned,
        pruned / sum(mask.numel() for mask in masks.values()),
        time.perf_counter() - started,
    )


def _check_arguments(
    windows: Int[Tensor, "n seqlen"],
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    warmup: int | None,
    weight_decay: float,
    train: str,
) -> None:
    if windows.shape[1] < 2:
        raise ValueError("tokens: expected windows of at least 2 tokens, since the first is not predicted")
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    if warmup is not None:
        check_whole("warmup", warmup, 0)
    if not 0 < as_number("learning_rate", learning_rate) <= 1:  # NaN fails too
        raise ValueError(f"learning_rate: expected a number above 0, at most 1, received {learning_rate}")
    if not 0 <= as_number("weight_decay", weight_decay) <= 1:
        raise ValueError(f"weight_decay: expected a number from 0 to 1, received {weight_decay}")
    if train not in get_args(Trains):
        raise ValueError(f"train: expected one of {', '.join(get_args(Trains))}, received {train!r}")


def _masks(decoder: Decoder) -> Masks:
    """Where each prunable weight that has zeros is zero."""
    prunable = {id(parameter_of(linear)) for linear in decoder.linears().values()}
    masks = {name: weight.detach() == 0 for name, weight in decoder.model.named_parameters() if id(weight) in prunable}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    if not masks:
        raise ValueError(
            "model: expected a pruned one, received one without zeros; nothing is pruned: call prune first"
        )
    return masks


def _trained(model: PreTrainedModel, masks: Masks, train: Trains) -> Trained:
    trained = {name: weight for name, weight in model.named_parameters() if train == "all" or name in masks}
    for name, weight in trained.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: expected weights in float32, received {weight.dtype} in {name}, where small steps would round "
                "to none; load it with dtype=torch.float32, prune, recover, and convert at the end"
            )
    if any(weight.is_inference() for weight in model.parameters()):
        raise ValueError("model: expected one that can be trained; load it outside of torch.inference_mode")
    return trained


@contextmanager
def _training(model: PreTrainedModel, trained: Trained) -> Iterator[None]:
    """Gradients for what is trained and nothing else; after a failure of ours the weights are as they were."""
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    wanted = {id(weight) for weight in trained.values()}
    try:
        for weight, _ in flags:
            weight.requires_grad_(id(weight) in wanted)
        with evaluating(model), torch.enable_grad():
            yield
    except SparselabError:
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(before[name])
        raise
    finally:
        for weight, flag in flags:
            weight.grad = None  # an older one would be of weights that are no more
            weight.requires_grad_(flag)


def _optimizer(trained: Trained, weight_decay: float) -> torch.optim.AdamW:
    matrices = [weight for weight in trained.values() if weight.ndim >= 2]
    vectors = [weight for weight in trained.values() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _order(count: int, draws: int, seed: int) -> Int[Tensor, " draws"]:
    """Indices of windows, round after round, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-draws // count))]
    return torch.cat(rounds)[:draws]


def _learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero behind the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _one_step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    batch: Int[Tensor, "batch seqlen"],
    trained: Trained,
    masks: Masks,
    rate: float,
) -> float:
    """The loss before the step."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch[:, 1:].flatten().to(logits.device))
    if not math.isfinite(value := float(loss.detach())):
        raise NonFiniteError(
            f"recover: the loss is {value}; the weights are as they were; lower learning_rate, or look at the model's "
            "perplexity before"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for name, mask in masks.items():
        if (gradient := trained[name].grad) is not None:  # an expert that no token has come to has none
            gradient.masked_fill_(mask, 0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return value


def _check_result(trained: Trained, masks: Masks) -> None:
    """Finite weights, and not one zero more or less than before."""
    for name, weight in trained.items():
        layer = name.removesuffix(".weight")
        if not all_finite(weight):
            raise NonFiniteError(f"{name}: NaN or infinite after recovery; it is as it was; lower learning_rate")
        if name not in masks:
            continue
        came, went = (
            int((masks[name] & (weight != 0)).count_nonzero()),
            int((~masks[name] & (weight == 0)).count_nonzero()),
        )
        if came or went:
            raise SparselabError(
                f"{layer}: expected the mask to stay, but {came} pruned weights came back and {went} kept ones became "
                "exactly zero; it is as it was; try another seed or learning_rate"
            )
