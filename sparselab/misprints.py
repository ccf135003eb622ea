"""Two formulas of SparseGPT as they are often written down, both wrong: to see beside the right ones what each costs.

Summaries of the paper divide by the diagonal of H where it divides by that of its inverse, and push the weights that go
onto those that stay one by one, as if each of those were the only one to make good for them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparselab.solvers import Pattern, damped, keep_largest


def mask_by_hessian_diagonal(
    weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"], sparsity: float | str | Pattern
) -> Bool[Tensor, "d_out d_in"]:
    """Keep the largest w_j² / H_jj of the layer: wrong, as a large H_jj makes a weight matter more, not less.

    Optimal Brain Surgeon has w_j² / [H⁻¹]_jj; for inputs without correlation that is w_j² H_jj.

    Args:
        weight, hessian, sparsity: see `solvers.sparsegpt`.
    """
    scores = weight.double().square() / damped(hessian.double(), 0.01).diagonal()
    return keep_largest(scores.flatten(), sparsity).view_as(weight)


def mask_by_inverse_diagonal(
    weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"], sparsity: float | str | Pattern
) -> Bool[Tensor, "d_out d_in"]:
    """Keep the largest w_j² / [H⁻¹]_jj of the layer, all chosen at once: the score as the paper has it.

    Args:
        weight, hessian, sparsity: see `solvers.sparsegpt`.
    Source: Hassibi & Stork 1993; Frantar & Alistarh 2023, equation 3.
    """
    inverse = torch.linalg.inv(damped(hessian.double(), 0.01))
    return keep_largest((weight.double().square() / inverse.diagonal()).flatten(), sparsity).view_as(weight)


def compensate_one_by_one(
    weight: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"], keep: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """Add −Σ_p w_p [H⁻¹]_ip / [H⁻¹]_ii over all pruned p to each kept weight i: wrong, as it solves nothing.

    What a pruned weight puts on the others is divided by its own [H⁻¹]_pp, and those who go together share a system.
    `solvers.reconstruct` has the right answer.

    Args:
        weight, hessian: see `solvers.sparsegpt`.
        keep: True where a weight survives.
    """
    inverse = torch.linalg.inv(damped(hessian.double(), 0.01))
    W = weight.double()
    pushed = -((W * ~keep) @ inverse) / inverse.diagonal()
    compensated: Tensor = (W + pushed) * keep
    return compensated.to(weight.dtype)
