"""ADMM: mask and weights found together, by turns, while the sparsity grows; every weight left can still move.

Unlike the sweep of SparseGPT, which settles a column for good when its turn comes, each iteration solves for all
weights at once, and one that was pruned may come back until the mask is settled.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers.checks import check_hessian, check_matrix, check_weight, check_whole, fitted
from sparselab.solvers.hessian import cholesky, damped, dead_columns, full_precision, working_dtype
from sparselab.solvers.sparsity import NM, Pattern, lowest, parse_sparsity, survivors

_SETTLED = 0.75  # the part of the iterations after which the mask no longer changes


@dataclass(frozen=True)
class AdmmSystem:
    """What all layers that see the same inputs share.

    Args:
        norm: D = √diag H, by which inputs are divided.
        hessian: Ĝ = D⁻¹HD⁻¹ + λI.
        inverse: (Ĝ + I)⁻¹.
        dead: inputs that were zero on all calibration tokens; their weights cannot matter and go first.
    """

    norm: Float[Tensor, " d"]
    hessian: Float[Tensor, "d d"]
    inverse: Float[Tensor, "d d"]
    dead: Bool[Tensor, " d"]


def admm(
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    sparsity: float | str | Pattern,
    percdamp: float = 0.01,
    iterations: int = 20,
) -> Float[Tensor, "d_out d_in"]:
    """Prune a weight and fit those that stay, by the alternating direction method of multipliers.

    With inputs scaled to unit norm, so that B = W·D and Ĝ = D⁻¹HD⁻¹ + λI with D = √diag H, it solves
    min tr((V−B) Ĝ (V−B)ᵀ) for V equal to a masked Z: V = (BĜ + Z − U)(Ĝ + I)⁻¹, Z = M ⊙ (V + U), U += V − Z. The mask M
    keeps the largest |V + U|, at first nearly all of them and in the end as many as the pattern says.

    Args:
        weight: [d_out, d_in]; not modified.
        hessian: XᵀX over the calibration tokens, not damped, of any scale; not modified.
        sparsity: 0.5, "50%", "2:4" or a pattern.
        percdamp: λ, a fraction of the scaled Hessian's diagonal, which is 1.
        iterations: at least 1; in the last quarter the mask stays as it is.

    Returns:
        A new weight of the same dtype, exactly `round(sparsity · size)` entries of the layer pruned, or M − N of each
        group.

    Raises:
        ValueError: wrong sparsity, shapes, percdamp or number of iterations, or M does not divide d_in.
        TypeError: an argument is of the wrong kind.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries, or the result does not fit the dtype.
        SingularHessianError: the Hessian is no sum of squares: adding 1 to its scaled diagonal does not help.
    Source: Boža 2024, Fast and Effective Weight Update for Pruned Large Language Models, with gradual pruning.
    """
    check_matrix("weight", weight)
    check_hessian(hessian, weight)
    system = admm_system(hessian.to(working_dtype(weight, hessian)), percdamp)
    return admm_iterations(weight, system, sparsity, iterations)


@torch.no_grad()
@full_precision()
def admm_system(hessian: Float[Tensor, "d d"], percdamp: float) -> AdmmSystem:
    """What `admm` needs of the inputs, for any number of layers that see them.

    Args, Raises: see `admm`.
    """
    H = damped(hessian, 0.0)  # only dead inputs are touched
    norm = H.diagonal().sqrt()
    G = damped(H / norm[:, None] / norm, percdamp)
    regular = G.clone()
    regular.diagonal().add_(1)
    return AdmmSystem(norm, G, torch.cholesky_inverse(cholesky(regular, percdamp)), dead_columns(hessian))


@torch.no_grad()
@full_precision()
def admm_iterations(
    weight: Float[Tensor, "d_out d_in"], system: AdmmSystem, sparsity: float | str | Pattern, iterations: int = 20
) -> Float[Tensor, "d_out d_in"]:
    """`admm` on what is known of the inputs.

    Args, Returns, Raises: see `admm`.
    """
    pattern = parse_sparsity(sparsity)
    check_weight(weight)
    check_whole("iterations", iterations, 1)
    pattern.check(weight.shape[1], weight.shape[1])
    if pattern.fraction == 0:
        return weight.clone()
    B = weight.to(working_dtype(weight, system.norm)) * system.norm
    target = B @ system.hessian
    V, U, keep = B, torch.zeros_like(B), torch.ones_like(B, dtype=torch.bool)
    settled = max(1, round(_SETTLED * iterations))
    for t in range(1, iterations + 1):
        if t <= settled:
            keep = _largest((V + U).masked_fill(system.dead, 0), pattern, 1 - (1 - t / settled) ** 3)
        Z = (V + U) * keep
        U = U + V - Z
        V = (target + Z - U) @ system.inverse
    return fitted((V + U) * keep / system.norm, weight.dtype)


def _largest(scores: Float[Tensor, "d_out d_in"], pattern: Pattern, share: float) -> Bool[Tensor, "d_out d_in"]:
    """Prune a share of what the pattern prunes, the smallest of the layer first; of N:M groups only what will go."""
    sizes = scores.abs()
    if isinstance(pattern, NM):
        sizes = sizes.masked_fill(survivors(sizes, pattern), torch.inf)
    count = round(share * round(pattern.fraction * sizes.numel()))
    return ~lowest(sizes.flatten(), count).view_as(sizes)
