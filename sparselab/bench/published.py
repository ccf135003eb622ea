"""What the published tools do, step for step, as the measure to be faster than.

Written for timing: the same operations on tensors of the same shapes in the same order as the published SparseGPT, so
that a ratio says what its users would gain. It shares nothing with the solvers but how patterns are written.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparselab.models.blocks import Call, Decoder, evaluating, find_linears, read_weight, write_weight
from sparselab.solvers import NM, parse_sparsity


@torch.no_grad()
def column_loop(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str,
    percdamp: float = 0.01,
    blocksize: int = 128,
) -> Float[Tensor, "d_out d_in"]:
    """SparseGPT as the published code runs it: three cubic steps, a sort a block, and small operations a column.

    Its threshold prunes one weight more in each block than asked for, and more under ties.

    Args:
        weight, hessian, sparsity, percdamp, blocksize: see `solvers.sparsegpt`; not checked.

    Source: Frantar & Alistarh 2023, algorithm 1 and the published code.
    """
    pattern = parse_sparsity(sparsity)
    W, H = weight.float().clone(), hessian.float().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(percdamp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    losses = torch.zeros(len(W), device=W.device)
    for start in range(0, W.shape[1], blocksize):
        stop = min(start + blocksize, W.shape[1])
        block, corner = W[:, start:stop].clone(), U[start:stop, start:stop]
        result, errors, block_losses = (torch.zeros_like(block) for _ in range(3))
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not isinstance(pattern, NM):
            scores = block**2 / corner.diagonal().reshape(1, -1) ** 2
            mask = scores <= scores.flatten().sort().values[int(scores.numel() * pattern.fraction)]
        for i in range(stop - start):
            w, d = block[:, i], corner[i, i]
            if isinstance(pattern, NM) and i % pattern.group == 0:
                these = slice(i, i + pattern.group)
                scores = block[:, these] ** 2 / corner.diagonal()[these].reshape(1, -1) ** 2
                lowest = scores.topk(pattern.pruned, dim=1, largest=False).indices
                mask.scatter_(1, i + lowest, True)
            q = w.clone()
            q[mask[:, i]] = 0
            result[:, i] = q
            block_losses[:, i] = (w - q) ** 2 / d**2
            error = (w - q) / d
            block[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, start:stop] = result
        losses += block_losses.sum(dim=1) / 2
        W[:, stop:] -= errors.matmul(U[start:stop, stop:])
    return W.to(weight.dtype)


def published_flow(
    model: PreTrainedModel, windows: Int[Tensor, "n seqlen"], sparsity: float | str, percdamp: float = 0.01
) -> None:
    """Prune a model in place as the published code walks it: a Hessian for each linear, one window at a time.

    Args:
        model: a causal language model; changed.
        windows: calibration tokens.
        sparsity, percdamp: see `column_loop`.
    """
    decoder = Decoder(model)
    with evaluating(model):
        entered = [decoder.embed(window[None]) for window in windows]
        hidden, calls = [states for states, _ in entered], [call for _, call in entered]
        del entered
        for index, block in enumerate(decoder.blocks):
            means = _watched(decoder, index, hidden, calls)
            for name, linear in _modules(block).items():
                write_weight(linear, column_loop(read_weight(linear), means[name].hessian, sparsity, percdamp))
            hidden = [decoder.run_block(index, states, call[index]) for states, call in zip(hidden, calls, strict=True)]


def _watched(
    decoder: Decoder, index: int, hidden: list[Float[Tensor, "1 seqlen hidden"]], calls: list[list[Call]]
) -> dict[str, "_RunningMean"]:
    """Run a block on every window; what each of its layers has seen."""
    linears = _modules(decoder.blocks[index])
    means = {name: _RunningMean(linear) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, mean=means[name]: mean.add(args[0]))
        for name, linear in linears.items()
    ]
    try:
        for states, call in zip(hidden, calls, strict=True):
            decoder.run_block(index, states, call[index])
    finally:
        for hook in hooks:
            hook.remove()
    return means


def _modules(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The layers that the published code would find, which knows no stacked experts."""
    return {name: linear for name, linear in find_linears(block).items() if isinstance(linear, nn.Linear | Conv1D)}


class _RunningMean:
    """2/n · XᵀX over n windows so far, rescaled at every window."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        d_in = read_weight(linear).shape[1]
        self.hessian = torch.zeros(d_in, d_in, device=linear.weight.device)
        self.windows = 0

    def add(self, inputs: Float[Tensor, "1 seqlen d_in"]) -> None:
        added = len(inputs)
        self.hessian *= self.windows / (self.windows + added)
        self.windows += added
        columns = (2 / self.windows) ** 0.5 * inputs.flatten(0, 1).T.float()
        self.hessian += columns.matmul(columns.T)
