"""The best mask there is, found by trying all: for small layers, to see how far any method is from it."""

import math
from itertools import combinations, product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.errors import SingularHessianError
from sparselab.solvers.checks import check_hessian, check_weight
from sparselab.solvers.hessian import damped
from sparselab.solvers.sparsity import NM, Pattern, parse_sparsity

_MOST_MASKS = 200_000  # of a row
_ELEMENTS_AT_ONCE = 2**22


@torch.no_grad()
def best_mask(
    weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"], sparsity: float | str | Pattern
) -> Bool[Tensor, "d_out d_in"]:
    """The mask whose `reconstruct` has the smallest layer error of all that prune `round(sparsity · d_in)` of each row.

    With the inputs k kept, the optimum leaves a row the error w H wᵀ − b_k H_kk⁻¹ b_kᵀ, b = w H; the rows of W are
    independent, and share the masks and their systems. For N:M, of each group M − N go. In float64.

    Args:
        weight: [d_out, d_in]; not modified.
        hessian: XᵀX over the calibration tokens; `damped(hessian, percdamp)` gives the best mask of the damped problem.
        sparsity: 0.5, "50%", "2:4" or a pattern.

    Returns:
        True where a weight survives.

    Raises:
        ValueError: shapes do not match, or there are too many masks; at 50%, 20 inputs are about as many as go.
        NonFiniteError: the weight or the Hessian has NaN or infinite entries.
        SingularHessianError: too few tokens for the optimum to be unique; damp the Hessian first.
    Source: the definition (Frantar & Alistarh 2023, equation 1, for one row).
    """
    check_weight(weight)
    check_hessian(hessian, weight)
    H = damped(hessian.double(), 0.0)
    masks = _masks(weight.shape[1], parse_sparsity(sparsity)).to(weight.device)
    kept = int(masks[0].sum())
    places = masks.nonzero()[:, 1].view(len(masks), kept)
    target = weight.double() @ H
    best = torch.full((len(weight),), -1.0, dtype=H.dtype, device=H.device)
    chosen = torch.zeros(len(weight), dtype=torch.long, device=H.device)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, kept * (kept + len(weight))))
    for first in range(0, len(places), step):
        some = places[first : first + step]
        gained = _gained(H, target, some)  # [masks, rows]
        most, which = gained.max(dim=0)
        chosen = torch.where(most > best, first + which, chosen)
        best = torch.maximum(most, best)
    return masks[chosen]


def _gained(H: Float[Tensor, "d d"], target: Float[Tensor, "rows d"], places: Tensor) -> Float[Tensor, "masks rows"]:
    """b_k H_kk⁻¹ b_kᵀ of each row under each mask: what is won back of the error of a row of zeros."""
    lower, info = torch.linalg.cholesky_ex(H[places[:, :, None], places[:, None, :]])
    if info.any():
        raise SingularHessianError(
            "the Hessian of some kept inputs is singular; pass damped(hessian, percdamp), or calibrate on more tokens"
        )
    b = target[:, places].permute(1, 2, 0)  # [masks, kept, rows]
    solved: Tensor = torch.linalg.solve_triangular(lower, b, upper=False)
    return solved.square().sum(dim=1)


def _masks(d_in: int, pattern: Pattern) -> Bool[Tensor, "masks d_in"]:
    """All masks of a row that the pattern allows."""
    group, groups = (pattern.group, d_in // pattern.group) if isinstance(pattern, NM) else (d_in, 1)
    pattern.check(d_in, group)
    kept = group - (pattern.pruned if isinstance(pattern, NM) else round(pattern.fraction * group))
    if (count := math.comb(group, kept) ** groups) > _MOST_MASKS:
        raise ValueError(
            f"weight: expected rows with at most {_MOST_MASKS} masks of {pattern}, received rows of {d_in} inputs, "
            f"which have {count:.2g}; take fewer columns"
        )
    one_group = torch.zeros(math.comb(group, kept), group, dtype=torch.bool)
    for row, places in enumerate(combinations(range(group), kept)):
        one_group[row, list(places)] = True
    choices = torch.tensor(list(product(range(len(one_group)), repeat=groups)))
    return one_group[choices].flatten(1)
