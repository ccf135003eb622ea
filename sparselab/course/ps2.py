"""Problem set 2, from Optimal Brain Surgeon to SparseGPT: what is wrong with an answer, exercise by exercise.

Each check takes the student's function and returns a line to show once all is well. Other seeds try other numbers. What
is right is computed here, in float64, by solving the problem itself again wherever the exercise asks for a short cut.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparselab import solvers
from sparselab.course import ps2_slips
from sparselab.course.answers import Answer, CheckError
from sparselab.course.ps2_slips import row_errors
from sparselab.course.values import TOLERANCE, agree, as_matrix, check_group, guess, kind, normal

# By how much the last score pruned and the first one kept differ at least, so that rounding does not choose the mask.
_CLEAR = 3e-3


def obs_scores(function: Callable[..., Any], seed: int = 0) -> str:
    """`obs_scores(weights, hessian)`: by how much δᵀHδ grows at least if one weight alone goes, for each weight.

    Raises:
        CheckError: not these numbers, with a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for d_in in (3, 6, 12):
        row, hessian = normal(draw, d_in), _hessian(draw, d_in)
        H, w = hessian.double(), row.double()
        changes = [_best_change(w, H, q) for q in range(d_in)]
        expected = torch.stack([change @ H @ change for change in changes])
        guesses = {
            "divided by the diagonal of H; first invert, then take the diagonal": w**2 / H.diagonal(),
            "w²·H_qq is the cost if no other weight moves": w**2 * H.diagonal(),
            "multiplied by [H⁻¹]_qq": w**2 * torch.linalg.inv(H).diagonal(),
            "half of it; here the cost is δᵀHδ, without the ½ of the textbooks": expected / 2,
            "w is not squared": expected / w.abs(),
        }
        got = as_matrix(answer, answer(row, hessian), row)
        agree(f"{answer.name}, {d_in} weights", got, expected, guesses)
    return f"{answer.name}: what each weight costs alone, the others making good for it."


def obs_update(function: Callable[..., Any], seed: int = 0) -> str:
    """`obs_update(weights, hessian, q)`: the weights with w_q = 0 and all others where δᵀHδ is smallest.

    Raises:
        CheckError: other weights, with a guess at the reason; weight q is not exactly zero.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for d_in in (3, 8, 24, 24, 24, 24):  # many, as rounding leaves something of w_q only now and then
        row, hessian = normal(draw, d_in), _hessian(draw, d_in)
        H, w = hessian.double(), row.double()
        for q in range(d_in):
            change, place = _best_change(w, H, q), torch.arange(d_in)
            without = w * (place != q)
            guesses = {
                "the others do not move": without,
                "the others move the wrong way": (w - change) * (place != q),
                "only weights after q move; all others have to": torch.where(place < q, w, w + change),
                "H stands where H⁻¹ belongs": w - w[q] / H[q, q] * H[q],
                "not divided by [H⁻¹]_qq": (w - w[q] * torch.linalg.inv(H)[q]) * (place != q),
                "that is the change; add it to the weights": change,
            }
            got = as_matrix(answer, answer(row, hessian, q), row)
            agree(f"{answer.name}, {d_in} weights, q = {q}", got, w + change, guesses)
            if got[q]:
                raise CheckError(
                    f"{answer.name}, {d_in} weights: weight q = {q} is {got[q]:.1g}, expected exactly 0; "
                    "rounding leaves something of it: set it to 0"
                )
    return f"{answer.name}: weight q is zero, and no other choice of the rest does better."


def damped_hessian(function: Callable[..., Any], seed: int = 0) -> str:
    """`damped_hessian(inputs, percdamp)`: XᵀX, a unit diagonal for dead inputs, then λ on the diagonal.

    Raises:
        CheckError: another matrix, with a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    cases = ((42, 6, 0, 0.1), (30, 8, 3, 0.5), (6, 12, 0, 0.1), (6, 12, 4, 1.0), (30, 8, 2, 0.0))
    for tokens, d_in, dead, percdamp in cases:
        inputs = normal(draw, tokens, d_in) * (0.1 + 0.3 * torch.rand(d_in, generator=draw))
        inputs[:, -1] = torch.tensor([0.0, 0.25, -0.25]).repeat(tokens // 3)  # often zero and in sum, yet not dead
        inputs[:, 1 : 1 + dead] = 0
        place = f"{answer.name}, {tokens} tokens, {d_in} inputs of which {dead} are dead, percdamp {percdamp:g}"
        X = inputs.double()
        got = as_matrix(answer, answer(inputs, percdamp), inputs.new_empty(d_in, d_in))
        agree(place, got, _damped(X, percdamp), ps2_slips.of_damping(X, percdamp))
    return f"{answer.name}: summed, safe where inputs are dead or tokens few, and damped."


def column_sweep(function: Callable[..., Any], seed: int = 0) -> str:
    """`column_sweep(weight, hessian, keep)`: column by column, what is pruned is made good by later columns.

    Raises:
        CheckError: a pruned weight is not zero; other weights, with the first wrong column and a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for d_out, d_in in ((7, 7), (4, 11), (9, 5)):
        weight, hessian = normal(draw, d_out, d_in), _hessian(draw, d_in)
        some = _mask(draw, d_out, d_in)
        for mask, keep in (
            ("half of the weights pruned", some),
            ("nothing pruned", torch.ones_like(some)),
            ("everything pruned", torch.zeros_like(some)),
        ):
            place = f"{answer.name}, weight {[d_out, d_in]}, {mask}"
            got = as_matrix(answer, answer(weight, hessian, keep), weight)
            if got[~keep].any():
                lost = f"{int(got[~keep].count_nonzero())} pruned weights"
                raise CheckError(f"{place}: {lost} are not zero at the end; where keep is True a weight stays")
            expected = _sweep(weight, hessian, keep=keep)[0]
            agree(place, got, expected, ps2_slips.of_the_sweep(weight.double(), hessian.double(), keep))
    return f"{answer.name}: the same as inverting the remaining Hessian at every column."


def sparsegpt(function: Callable[..., Any], seed: int = 0) -> str:
    """`sparsegpt(weight, hessian, sparsity, blocksize, keep=None)`: masks chosen block by block, and compensated.

    Raises:
        CheckError: a given mask's result depends on the block size; a block prunes another number or other weights.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    weight, hessian, keep = normal(draw, 6, 10), _hessian(draw, 10), _mask(draw, 6, 10)
    expected = _sweep(weight, hessian, keep=keep)[0]
    slips = ps2_slips.of_the_sweep(weight.double(), hessian.double(), keep)
    for blocksize in (10, 5, 4, 1, 16):  # one block, equal parts, a narrow rest, single columns, wider than the layer
        place = f"{answer.name} with a given mask, 10 inputs, blocksize {blocksize}"
        got = as_matrix(answer, answer(weight, hessian, 0.5, blocksize, keep), weight)
        if not torch.equal(got != 0, keep):
            raise CheckError(f"{place}: zeros are not where the mask says; keep=… is to be used as it is")
        agree(place, got, expected, slips, blocksize)
    for shape, sparsity, blocksize in (((12, 12), 0.5, 6), ((8, 12), 0.4, 4), ((5, 13), 0.65, 5), ((9, 9), 0.3, 9)):
        weight, hessian = _clear_layer(draw, shape, sparsity, blocksize)
        _check_blocks(answer, weight, hessian, sparsity, blocksize)
    weight = torch.randint(1, 3, (6, 10), generator=draw) * normal(draw, 6, 10).sign()
    weight[:, :4].sign_()
    for sparsity in (0.45, 0.0, 1.0):  # many scores are equal, in the first block all
        _check_blocks(answer, weight, 2 * torch.eye(10), sparsity, 4)
    return f"{answer.name}: any block size for a given mask, exact counts, and each block chooses when it is reached."


def optimality_gap(function: Callable[..., Any], seed: int = 0) -> str:
    """`optimality_gap(weight, hessian, pruned, keep)`: layer error, as a multiple of the least that the mask allows.

    Raises:
        CheckError: another number, with a guess at the reason.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for d_out, d_in in ((5, 8), (8, 8), (3, 14)):
        weight = normal(draw, d_out, d_in) * torch.logspace(-1, 0.5, d_out)[:, None]  # rows of different weight
        hessian, keep = _hessian(draw, d_in), _mask(draw, d_out, d_in)
        keep[0] = True  # a row that loses nothing has no error, which no ratio of its own survives
        best = _best(weight, hessian, keep)
        swept = _sweep(weight, hessian, keep=keep)[0]
        for which, pruned in (("magnitude", weight * keep), ("a sweep", swept.float()), ("the optimum", best.float())):
            place = f"{answer.name}, weight {[d_out, d_in]} pruned by {which}"
            given, got = (weight, hessian, pruned, keep), answer(weight, hessian, pruned, keep)
            if not isinstance(got, float | int | Tensor) or (isinstance(got, Tensor) and got.numel() != 1):
                raise CheckError(f"{place}: returns {kind(got)}, expected one number for the layer")
            expected = float(row_errors(weight, hessian, pruned).sum() / row_errors(weight, hessian, best).sum())
            if not math.isclose(float(got), expected, rel_tol=TOLERANCE):
                reason = guess(torch.tensor(float(got)), ps2_slips.of_the_gap(best, *given))
                if not reason and float(got) < 1 - TOLERANCE:
                    reason = " (below 1, as if something were better than the best: is H cut to the kept inputs first?)"
                raise CheckError(f"{place}: {float(got):.4f}, expected {expected:.4f}{reason}")
    return f"{answer.name}: 1 at the optimum, and never below."


def _hessian(draw: torch.Generator, d_in: int) -> Tensor:
    """XᵀX of inputs that are strongly correlated and of different sizes, damped so that float32 can invert it."""
    mixing = torch.eye(d_in) + 1.5 * normal(draw, d_in, d_in) / d_in**0.5
    inputs, scale = normal(draw, 4 * d_in, d_in) @ mixing, torch.exp(0.5 * normal(draw, d_in))
    return solvers.damped(inputs.T @ inputs, 0.05) * torch.outer(scale, scale)


def _damped(X: Tensor, percdamp: float) -> Tensor:
    H = X.T @ X
    H.diagonal()[H.diagonal() == 0] = 1
    return H + percdamp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def _best(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The best weights for a mask, row by row."""
    W, H = weight.double(), hessian.double()
    best = torch.zeros_like(W)
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.solve(H[kept][:, kept], (H @ W[row])[kept])
    return best


def _mask(draw: torch.Generator, d_out: int, d_in: int) -> Tensor:
    """Half of each row, chosen at random; no row is empty."""
    return torch.rand(d_out, d_in, generator=draw).argsort(dim=1).ge(d_in // 2)


def _best_change(w: Tensor, H: Tensor, q: int) -> Tensor:
    """The δ with δ_q = −w_q and the smallest δᵀHδ: least squares for all other weights."""
    others = torch.arange(len(w)) != q
    change = torch.where(others, 0, -w)
    change[others] = torch.linalg.solve(H[others][:, others], w[q] * H[others, q])
    return change


def _sweep(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.0, blocksize: int = 1, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """SparseGPT by its definition: at every column, the Hessian of the columns from there on is inverted anew.

    Returns:
        The new weight; the scores of each block as it was reached; by how much the closest choice was clear of a tie.
    """
    W, H, clear = weight.double().clone(), hessian.double(), math.inf
    mask, scores = torch.ones_like(W, dtype=torch.bool) if keep is None else keep, torch.zeros_like(W)
    inverses = [torch.linalg.inv(H[q:, q:]) for q in range(len(H))]
    for q, inverse in enumerate(inverses):
        if keep is None and q % blocksize == 0:
            block = slice(q, q + blocksize)
            scores[:, block] = W[:, block] ** 2 / torch.stack([each[0, 0] for each in inverses[block]])
            mask[:, block], margin = _largest(scores[:, block], sparsity)
            clear = min(clear, margin)
        gone = torch.where(mask[:, q], 0, W[:, q])
        W[:, q:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        W[:, q] *= mask[:, q]
    return W, scores, clear


def _largest(scores: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """The mask of a block without its `round(sparsity · size)` lowest scores, and how clear the choice is."""
    ordered, order = scores.flatten().sort()
    pruned, mask = round(sparsity * len(order)), torch.ones(len(order), dtype=torch.bool)
    mask[order[:pruned]] = False
    margin = 1 - float(ordered[pruned - 1] / ordered[pruned]) if 0 < pruned < len(order) else math.inf
    return mask.view_as(scores), margin


def _clear_layer(
    draw: torch.Generator, shape: tuple[int, int], sparsity: float, blocksize: int
) -> tuple[Tensor, Tensor]:
    while True:
        weight, hessian = normal(draw, *shape), _hessian(draw, shape[1])
        if _sweep(weight, hessian, sparsity, blocksize)[2] > _CLEAR:
            return weight, hessian


def _check_blocks(answer: Answer, weight: Tensor, hessian: Tensor, sparsity: float, blocksize: int) -> None:
    place = f"{answer.name}, weight {list(weight.shape)}, sparsity {sparsity:g}, blocksize {blocksize}"
    got = as_matrix(answer, answer(weight, hessian, sparsity, blocksize), weight)
    keep, scores = got != 0, _sweep(weight, hessian, sparsity, blocksize)[1]
    slips = ps2_slips.of_the_score(weight.double(), hessian.double(), scores)
    whole = int(keep.sum()) == keep.numel() - round(sparsity * keep.numel())
    for columns in torch.arange(weight.shape[1]).split(blocksize):
        kept, size = keep[:, columns], len(weight) * len(columns)
        lost, expected = size - int(kept.sum()), round(sparsity * size)
        usual = {why: torch.equal(kept, _largest(each[:, columns], sparsity)[0]) for why, each in slips.items()} | {
            "int() where round() is meant?": lost == int(sparsity * size) != expected,
            "the layer as a whole loses the right number; every block has to": lost != expected and whole,
            "every row loses the same number; all rows compete": lost < size and len(kept.sum(dim=1).unique()) == 1,
        }
        reasons = [why for why, found in usual.items() if found]
        reason = f" ({reasons[0]})" if len(reasons) == 1 else ""
        block = f"the block of columns {int(columns[0])} to {int(columns[-1])}{reason}"
        check_group(place, block, scores[:, columns], kept, expected)
    agree(place, got, _sweep(weight, hessian, keep=keep)[0])  # of equal scores any may have gone
