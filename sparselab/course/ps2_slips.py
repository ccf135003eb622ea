"""What the usual mistakes in problem set 2 give, to guess at the reason of a wrong answer."""

import torch
from torch import Tensor

from sparselab import solvers
from sparselab.course.values import Slips


def row_errors(weight: Tensor, hessian: Tensor, pruned: Tensor) -> Tensor:
    """The diagonal of (W−Ŵ)H(W−Ŵ)ᵀ: the error of each row."""
    change = weight.double() - pruned.double()
    return ((change @ hessian.double()) * change).sum(dim=1)


def of_damping(X: Tensor, percdamp: float) -> Slips:
    """Of `damped_hessian`, for inputs X [tokens, d_in]."""
    H, unit = X.T @ X, torch.eye(X.shape[1], dtype=X.dtype)
    mended, undead = solvers.damped(H, 0.0), H + percdamp * H.diagonal().mean() * unit
    return {
        "the mean over tokens is taken; H is their sum": solvers.damped(H / len(X), percdamp),
        "λ on the diagonal is missing": mended,
        "λ is percdamp times the mean of the diagonal, not percdamp itself": mended + percdamp * unit,
        "λ goes by the mean of the diagonal, not of all entries": mended + percdamp * mended.mean() * unit,
        "λ is on the diagonal only": mended + percdamp * mended.diagonal().mean(),
        "dead inputs have no unit diagonal": undead,
        "λ is taken before dead inputs get their unit diagonal": mended + undead - H,
        "dead inputs are 1 after damping; set them to 1 before": undead.where((unit == 0) | (H.diagonal() > 0), 1),
    }


def of_the_sweep(W: Tensor, H: Tensor, keep: Tensor) -> Slips:
    """Of `column_sweep`, all in float64."""
    inverse, factor = torch.linalg.inv(H), torch.linalg.cholesky(H, upper=True)
    U = torch.linalg.cholesky(inverse, upper=True)
    shares = {
        "nothing is compensated: is U upper triangular, and err taken before weights become zero?": torch.zeros_like(U),
        "later columns move the wrong way": -U / U.diagonal()[:, None],
        "err is w_q/U_qq: it is not divided": U,
        "err is w_q/U_qq, not w_q/U_qq²": U / U.diagonal()[:, None] ** 2,
        "U is the factor of H⁻¹, not of H": factor / factor.diagonal()[:, None],
        "H⁻¹ of all columns is used to the end": inverse / inverse.diagonal()[:, None],
    }
    slips = {}
    for reason, share in shares.items():
        swept = W.clone()
        for q in range(len(H)):
            swept[:, q + 1 :] -= torch.outer(swept[:, q] * ~keep[:, q], share[q, q + 1 :])
        slips[reason] = swept * keep
    at_once = W - (W * ~keep / U.diagonal()) @ U.triu(1)
    return slips | {"err is taken from the dense weight; w_q is what earlier columns have left": at_once * keep}


def of_the_score(W: Tensor, H: Tensor, scores: Tensor) -> Slips:
    """Of what `sparsegpt` scores, given the right scores."""
    inverse = torch.linalg.inv(H)
    U = torch.linalg.cholesky(inverse, upper=True).diagonal()
    now = scores * U**2
    return {
        "the weights of before compensation are scored; score a block when it is reached": W**2 / U**2,
        "w² is scored; the score is w²/U_qq²": now,
        "w²/U_qq is scored; the score is w²/U_qq²": now / U,
        "w²/[H⁻¹]_qq is scored, as if finished columns could move; the score is w²/U_qq²": now / inverse.diagonal(),
    }


def of_the_gap(best: Tensor, weight: Tensor, hessian: Tensor, pruned: Tensor, keep: Tensor) -> Slips:
    """Of `optimality_gap`, given the best weights for the mask."""
    error, least = row_errors(weight, hessian, pruned), row_errors(weight, hessian, best)
    masked, unit = row_errors(weight, hessian, weight * keep), torch.eye(len(hessian))
    return {
        "a ratio for each row, then their mean; sum errors over rows, then divide": (error / least)[1:].mean(),
        "one too little: the ratio itself is asked for": error.sum() / least.sum() - 1,
        "the square root of it": (error.sum() / least.sum()).sqrt(),
        "upside down": least.sum() / error.sum(),
        "the error, not divided by the least": error.sum(),
        "compared with the mask alone; its weights can do better": error.sum() / masked.sum(),
        "H has no part in the errors": row_errors(weight, unit, pruned).sum() / row_errors(weight, unit, best).sum(),
    }
