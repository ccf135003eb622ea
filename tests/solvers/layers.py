"""Layers to prune, and the slow float64 answers that the solvers are held against."""

import torch
from torch import Tensor

from sparselab import solvers
from sparselab.solvers import NM, parse_sparsity

# Relative difference allowed between layer errors of two float32 sweeps: a rounding may flip a near tie.
SAME_ERROR = 1e-4


def layer(d_out: int, d_in: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs, and their Hessian, all float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    tokens = 3 * d_in + 8 if tokens is None else tokens
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
    inputs = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    inputs = inputs @ mixing + 0.3 * torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs


def oracle(weight: Tensor, hessian: Tensor, sparsity, percdamp=0.01, blocksize=128, keep=None) -> Tensor:
    """SparseGPT by its definition: the Hessian of the remaining columns inverted anew at every column, in float64."""
    pattern = parse_sparsity(sparsity)
    W = weight.double().clone()
    H = solvers.damped(hessian.double(), percdamp)
    alive = ~solvers.dead_columns(hessian)
    d_in = W.shape[1]
    mask = torch.ones_like(W, dtype=torch.bool) if keep is None else keep
    group = pattern.group if isinstance(pattern, NM) else blocksize
    for q in range(d_in):
        if keep is None and q % group == 0:
            columns = range(q, min(q + group, d_in))
            scores = torch.stack([W[:, j] ** 2 / torch.linalg.inv(H[j:, j:])[0, 0] * alive[j] for j in columns], dim=1)
            if isinstance(pattern, NM):
                for row in range(len(W)):
                    order = sorted(range(group), key=lambda j: (float(scores[row, j]), j))
                    mask[row, [q + j for j in order[: group - pattern.kept]]] = False
            else:
                flat = scores.T.flatten().tolist()
                order = sorted(range(len(flat)), key=lambda k: (flat[k], k))
                for k in order[: round(pattern.fraction * len(flat))]:
                    mask[k % len(W), q + k // len(W)] = False
        inverse = torch.linalg.inv(H[q:, q:])
        gone = torch.where(mask[:, q], 0.0, W[:, q])
        W[:, q:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        W[:, q] = torch.where(mask[:, q], W[:, q], 0.0)
    return W
