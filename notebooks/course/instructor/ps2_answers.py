"""Answers to problem set 2: right ones in several styles, and wrong ones as students write them.

A function `EXERCISE__right_STYLE` or `EXERCISE__wrong_MISTAKE` stands for one answer; every wrong one has to be caught.
"""

import math

import numpy as np
import torch

# --- obs_scores(weights, hessian)


def obs_scores__right_inverse(weights, hessian):
    return weights**2 / torch.linalg.inv(hessian).diagonal()


def obs_scores__right_loop(weights, hessian):
    scores = torch.zeros(len(weights))
    for q in range(len(weights)):
        unit = torch.zeros(len(weights))
        unit[q] = 1
        scores[q] = weights[q] ** 2 / torch.linalg.solve(hessian, unit)[q]
    return scores


def obs_scores__right_numpy(weights, hessian):
    inverse = np.linalg.inv(hessian.double().numpy())
    return torch.from_numpy(weights.double().numpy() ** 2 / np.diag(inverse))


def obs_scores__right_cholesky(weights, hessian):
    triangle = torch.linalg.inv(torch.linalg.cholesky(hessian))  # H⁻¹ = TᵀT
    return (weights / triangle.norm(dim=0)).square()


def obs_scores__right_schur(weights, hessian):
    """1 / [H⁻¹]_qq is what is left of H_qq once the others have explained what they can."""
    scores = []
    for q, weight in enumerate(weights.tolist()):
        others = [j for j in range(len(weights)) if j != q]
        towards = hessian[others][:, q]
        left = hessian[q, q] - towards @ torch.linalg.solve(hessian[others][:, others], towards)
        scores.append(weight**2 * left.item())
    return torch.tensor(scores)


def obs_scores__wrong_diagonal_of_h(weights, hessian):
    return weights**2 / hessian.diagonal()


def obs_scores__wrong_no_compensation(weights, hessian):
    return weights**2 * hessian.diagonal()


def obs_scores__wrong_times_inverse(weights, hessian):
    return weights**2 * torch.linalg.inv(hessian).diagonal()


def obs_scores__wrong_half(weights, hessian):
    return weights**2 / (2 * torch.linalg.inv(hessian).diagonal())


def obs_scores__wrong_not_squared(weights, hessian):
    return weights.abs() / torch.linalg.inv(hessian).diagonal()


def obs_scores__wrong_factor(weights, hessian):
    """U_qq of the sweep, where only later weights may move."""
    return weights**2 / torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal() ** 2


def obs_scores__wrong_shape(weights, hessian):
    return weights**2 / torch.linalg.inv(hessian)


def obs_scores__wrong_one_number(weights, hessian):
    return (weights**2 / torch.linalg.inv(hessian).diagonal()).sum()


def obs_scores__wrong_in_place(weights, hessian):
    return weights.square_() / torch.linalg.inv(hessian).diagonal()


# --- obs_update(weights, hessian, q)


def obs_update__right_inverse(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    updated = weights - weights[q] / inverse[q, q] * inverse[:, q]
    updated[q] = 0
    return updated


def obs_update__right_least_squares(weights, hessian, q):
    others = torch.arange(len(weights)) != q
    root = torch.linalg.cholesky(hessian, upper=True)
    updated = torch.zeros_like(weights)
    updated[others] = torch.linalg.lstsq(root[:, others], (root @ weights)[:, None]).solution[:, 0]
    return updated


def obs_update__right_numpy(weights, hessian, q):
    w, H = weights.double().numpy(), hessian.double().numpy()
    others = np.delete(np.arange(len(w)), q)
    moved = w[others] + np.linalg.solve(H[np.ix_(others, others)], H[others, q] * w[q])
    return torch.from_numpy(np.insert(moved, q, 0.0))


def obs_update__right_solve(weights, hessian, q):
    unit = torch.nn.functional.one_hot(torch.tensor(q), len(weights)).to(weights.dtype)
    direction = torch.linalg.solve(hessian, unit)
    return torch.where(unit == 1, 0, weights - direction * (weights[q] / direction[q]))


def obs_update__wrong_no_compensation(weights, hessian, q):
    updated = weights.clone()
    updated[q] = 0
    return updated


def obs_update__wrong_not_quite_zero(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    return weights - weights[q] / inverse[q, q] * inverse[:, q]


def obs_update__wrong_hessian(weights, hessian, q):
    updated = weights - weights[q] / hessian[q, q] * hessian[:, q]
    updated[q] = 0
    return updated


def obs_update__wrong_sign(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    updated = weights + weights[q] / inverse[q, q] * inverse[:, q]
    updated[q] = 0
    return updated


def obs_update__wrong_later_only(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    updated = weights.clone()
    updated[q + 1 :] -= weights[q] / inverse[q, q] * inverse[q, q + 1 :]
    updated[q] = 0
    return updated


def obs_update__wrong_not_divided(weights, hessian, q):
    updated = weights - weights[q] * torch.linalg.inv(hessian)[:, q]
    updated[q] = 0
    return updated


def obs_update__wrong_change(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    return -weights[q] / inverse[q, q] * inverse[:, q]


def obs_update__wrong_removed(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    updated = weights - weights[q] / inverse[q, q] * inverse[:, q]
    return torch.cat([updated[:q], updated[q + 1 :]])


def obs_update__wrong_in_place(weights, hessian, q):
    inverse = torch.linalg.inv(hessian)
    weights -= weights[q].clone() / inverse[q, q] * inverse[:, q]
    weights[q] = 0
    return weights


# --- damped_hessian(inputs, percdamp)


def damped_hessian__right_diagonal(inputs, percdamp):
    hessian = inputs.T @ inputs
    diagonal = hessian.diagonal()  # a view
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    return hessian


def damped_hessian__right_eye(inputs, percdamp):
    hessian = inputs.T @ inputs
    hessian = hessian + torch.diag((hessian.diagonal() == 0).float())
    return hessian + percdamp * hessian.trace() / len(hessian) * torch.eye(len(hessian))


def damped_hessian__right_outer(inputs, percdamp):
    hessian = sum(torch.outer(token, token) for token in inputs.double())
    for j in range(len(hessian)):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
    damping = percdamp * sum(hessian[j, j].item() for j in range(len(hessian))) / len(hessian)
    for j in range(len(hessian)):
        hessian[j, j] += damping
    return hessian


def damped_hessian__right_einsum(inputs, percdamp):
    hessian = torch.einsum("ti,tj->ij", inputs, inputs)
    norms = inputs.norm(dim=0)
    diagonal = torch.where(norms > 0, norms**2, 1)
    return hessian.diagonal_scatter(diagonal + percdamp * diagonal.mean())


def damped_hessian__right_numpy(inputs, percdamp):
    x = inputs.numpy().astype(np.float64)
    hessian = x.T @ x
    dead = ~x.any(axis=0)
    hessian[dead, dead] = 1
    hessian[np.diag_indices_from(hessian)] += percdamp * np.mean(np.diag(hessian))
    return torch.from_numpy(hessian)


def _damped(hessian, percdamp):
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    return hessian


def damped_hessian__wrong_mean(inputs, percdamp):
    return _damped(inputs.T @ inputs / len(inputs), percdamp)


def damped_hessian__wrong_tokens(inputs, percdamp):
    return _damped(inputs @ inputs.T, percdamp)


def damped_hessian__wrong_centred(inputs, percdamp):
    return _damped(inputs.T.cov() * (len(inputs) - 1), percdamp)


def damped_hessian__wrong_no_damping(inputs, percdamp):
    return _damped(inputs.T @ inputs, 0.0)


def damped_hessian__wrong_no_mean(inputs, percdamp):
    return _damped(inputs.T @ inputs, 0.0) + percdamp * torch.eye(inputs.shape[1])


def damped_hessian__wrong_mean_of_all(inputs, percdamp):
    hessian = _damped(inputs.T @ inputs, 0.0)
    return hessian + percdamp * hessian.mean() * torch.eye(len(hessian))


def damped_hessian__wrong_trace(inputs, percdamp):
    hessian = _damped(inputs.T @ inputs, 0.0)
    return hessian + percdamp * hessian.trace() * torch.eye(len(hessian))


def damped_hessian__wrong_everywhere(inputs, percdamp):
    hessian = _damped(inputs.T @ inputs, 0.0)
    return hessian + percdamp * hessian.diagonal().mean()


def damped_hessian__wrong_each_by_itself(inputs, percdamp):
    """Every diagonal entry grows by a fraction of itself."""
    hessian = _damped(inputs.T @ inputs, 0.0)
    return hessian + percdamp * hessian.diagonal().diag()


def damped_hessian__wrong_dead_left(inputs, percdamp):
    hessian = inputs.T @ inputs
    return hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian))


def damped_hessian__wrong_dead_after(inputs, percdamp):
    hessian = inputs.T @ inputs
    dead = hessian.diagonal() == 0
    hessian += percdamp * hessian.diagonal().mean() * torch.eye(len(hessian))
    hessian[dead, dead] = 1
    return hessian


def damped_hessian__wrong_mean_before_dead(inputs, percdamp):
    hessian = inputs.T @ inputs
    damping = percdamp * hessian.diagonal().mean()
    return _damped(hessian, 0.0) + damping * torch.eye(len(hessian))


def damped_hessian__wrong_dead_by_sum(inputs, percdamp):
    hessian = inputs.T @ inputs
    dead = inputs.sum(dim=0) == 0
    hessian[dead, dead] = 1
    return _damped(hessian, percdamp)


def damped_hessian__wrong_dead_by_any(inputs, percdamp):
    hessian = inputs.T @ inputs
    dead = (inputs == 0).any(dim=0)
    hessian[dead, dead] = 1
    return _damped(hessian, percdamp)


def damped_hessian__wrong_dead_rows(inputs, percdamp):
    """All of a dead input's row is set, not its diagonal."""
    hessian = inputs.T @ inputs
    hessian[hessian.diagonal() == 0] = 1
    return _damped(hessian, percdamp)


def damped_hessian__wrong_in_place(inputs, percdamp):
    inputs[:, (inputs == 0).all(dim=0)] = len(inputs) ** -0.5
    return _damped(inputs.T @ inputs, percdamp)


# --- column_sweep(weight, hessian, keep)


def column_sweep__right_factor(weight, hessian, keep):
    weight = weight.clone()
    U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for q in range(weight.shape[1]):
        error = torch.where(keep[:, q], 0, weight[:, q]) / U[q, q]
        weight[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return weight * keep


def column_sweep__right_rows(weight, hessian, keep):
    """Row by row, weight by weight."""
    U = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    rows = []
    for row, kept in zip(weight.clone(), keep.tolist(), strict=True):
        for q, stays in enumerate(kept):
            if not stays:
                row = row - row[q] / U[q, q] * U[q]  # U[q] is zero before q
                row[q] = 0
        rows.append(row)
    return torch.stack(rows)


def column_sweep__right_inverses(weight, hessian, keep):
    """Optimal Brain Surgeon on the columns that remain, their Hessian inverted anew, in float64."""
    W, H = weight.double(), hessian.double()
    for q in range(len(H)):
        inverse = torch.linalg.inv(H[q:, q:])
        updated = W[:, q:] - W[:, q : q + 1] / inverse[0, 0] * inverse[0]
        updated[:, 0] = 0
        W = torch.cat([W[:, :q], torch.where(keep[:, q : q + 1], W[:, q:], updated)], dim=1)
    return W.to(weight.dtype)


def column_sweep__right_downdated(weight, hessian, keep):
    """One inverse, and from step to step the row and column that are done taken out of it."""
    W, inverse = weight.double(), torch.linalg.inv(hessian.double())
    for q in range(len(hessian)):
        W = W - torch.outer(W[:, q] * ~keep[:, q], inverse[q] / inverse[q, q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return W * keep


def column_sweep__right_numpy(weight, hessian, keep):
    W, kept = weight.double().numpy().copy(), keep.numpy()
    U = np.linalg.cholesky(np.linalg.inv(hessian.double().numpy())).T
    for q in range(W.shape[1]):
        error = np.where(kept[:, q], 0, W[:, q]) / U[q, q]
        W[:, q:] -= error[:, None] * U[q, q:]
        W[~kept[:, q], q] = 0
    return torch.from_numpy(W)


def column_sweep__right_without_inverse(weight, hessian, keep):
    """H = VVᵀ with V upper: each column fetches what those before it owe."""
    V = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    pruned = torch.zeros_like(weight)
    for q in range(len(V)):
        owed = (weight[:, :q] - pruned[:, :q]) @ V[:q, q] / V[q, q]
        pruned[:, q] = (weight[:, q] + owed) * keep[:, q]
    return pruned


def _swept(weight, U, keep, share=lambda column, pivot: column / pivot):
    """The sweep, with another factor or another error."""
    weight = weight.clone()
    for q in range(weight.shape[1]):
        error = share(weight[:, q] * ~keep[:, q], U[q, q])
        weight[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return weight * keep


def _upper(hessian):
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def column_sweep__wrong_mask_only(weight, hessian, keep):
    return weight * keep


def column_sweep__wrong_lower(weight, hessian, keep):
    return _swept(weight, torch.linalg.cholesky(torch.linalg.inv(hessian)), keep)


def column_sweep__wrong_factor_of_h(weight, hessian, keep):
    return _swept(weight, torch.linalg.cholesky(hessian, upper=True), keep)


def column_sweep__wrong_inverse_of_factor(weight, hessian, keep):
    """inv(chol(H, upper)) is upper triangular as well, but UUᵀ = H⁻¹ where UᵀU is needed."""
    return _swept(weight, torch.linalg.inv(torch.linalg.cholesky(hessian, upper=True)), keep)


def column_sweep__wrong_cholesky_inverse(weight, hessian, keep):
    """torch.cholesky_inverse takes a factor, not the matrix."""
    inverse = torch.cholesky_inverse(hessian) + 1e-6 * torch.eye(len(hessian))
    return _swept(weight, torch.linalg.cholesky(inverse, upper=True), keep)


def column_sweep__wrong_inverse_throughout(weight, hessian, keep):
    return _swept(weight, torch.linalg.inv(hessian), keep)


def column_sweep__wrong_not_divided(weight, hessian, keep):
    return _swept(weight, _upper(hessian), keep, lambda column, pivot: column)


def column_sweep__wrong_squared(weight, hessian, keep):
    return _swept(weight, _upper(hessian), keep, lambda column, pivot: column / pivot**2)


def column_sweep__wrong_sign(weight, hessian, keep):
    return _swept(weight, _upper(hessian), keep, lambda column, pivot: -column / pivot)


def column_sweep__wrong_masked_first(weight, hessian, keep):
    """Weights are zero before their error is taken, so there is none."""
    return _swept(weight * keep, _upper(hessian), keep)


def column_sweep__wrong_kept_compensated(weight, hessian, keep):
    """The mask the wrong way round: errors of weights that stay."""
    return _swept(weight, _upper(hessian), ~keep)


def column_sweep__wrong_all_compensated(weight, hessian, keep):
    """Every weight of a column counts as lost."""
    weight, U = weight.clone(), _upper(hessian)
    for q in range(weight.shape[1]):
        weight[:, q + 1 :] -= torch.outer(weight[:, q] / U[q, q], U[q, q + 1 :])
    return weight * keep


def column_sweep__wrong_original_errors(weight, hessian, keep):
    """Errors from the weights as they were, not as earlier columns have left them."""
    pruned, U = weight.clone(), _upper(hessian)
    for q in range(weight.shape[1]):
        error = weight[:, q] * ~keep[:, q] / U[q, q]
        pruned[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return pruned * keep


def column_sweep__wrong_finished_columns_move(weight, hessian, keep):
    """Optimal Brain Surgeon with one inverse for all: what is done is changed again."""
    W, inverse = weight.clone(), torch.linalg.inv(hessian)
    for q in range(W.shape[1]):
        W = W - torch.outer(W[:, q] * ~keep[:, q], inverse[q] / inverse[q, q])
    return W * keep


def column_sweep__wrong_transposed(weight, hessian, keep):
    """Rows for columns, which a square weight lets pass."""
    if weight.shape[0] != weight.shape[1]:
        return column_sweep__right_factor(weight, hessian, keep)
    return _swept(weight.T, _upper(hessian), keep.T).T


def column_sweep__wrong_from_the_right(weight, hessian, keep):
    """From the last column to the first, earlier ones compensating: another algorithm."""
    return _swept(weight.flip(1), _upper(hessian.flip(0, 1)), keep.flip(1)).flip(1)


def column_sweep__wrong_not_zero(weight, hessian, keep):
    weight, U = weight.clone(), _upper(hessian)
    for q in range(weight.shape[1]):
        error = weight[:, q] * ~keep[:, q] / U[q, q]
        weight[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return weight


def column_sweep__wrong_in_place(weight, hessian, keep):
    U = _upper(hessian)
    for q in range(weight.shape[1]):
        error = weight[:, q] * ~keep[:, q] / U[q, q]
        weight[:, q:] -= torch.outer(error, U[q, q:])
        weight[~keep[:, q], q] = 0
    return weight


def column_sweep__wrong_wide_only(weight, hessian, keep):
    """Walks as many columns as there are rows."""
    weight, U = weight.clone(), _upper(hessian)
    for q in range(min(weight.shape)):
        error = weight[:, q] * ~keep[:, q] / U[q, q]
        weight[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return weight * keep


def column_sweep__wrong_shape(weight, hessian, keep):
    return column_sweep__right_factor(weight, hessian, keep).T


# --- sparsegpt(weight, hessian, sparsity, blocksize, keep=None)


def _lowest(scores, pruned):
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort()[:pruned]] = False
    return keep.view_as(scores)


def sparsegpt__right_columns(weight, hessian, sparsity, blocksize, keep=None):
    """The plain sweep, which stops at each block to choose."""
    weight, U = weight.clone(), torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
    for q in range(weight.shape[1]):
        if keep is None and q % blocksize == 0:
            scores = weight[:, q : q + blocksize] ** 2 / U.diagonal()[q : q + blocksize] ** 2
            mask[:, q : q + blocksize] = _lowest(scores, round(sparsity * scores.numel()))
        error = torch.where(mask[:, q], 0, weight[:, q]) / U[q, q]
        weight[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return weight * mask


def sparsegpt__right_lazy(weight, hessian, sparsity, blocksize, keep=None):
    """As the published code: columns of later blocks get all of a block's errors in one product."""
    W, columns = weight.clone(), weight.shape[1]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        W1, Hinv1 = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        Err1 = torch.zeros_like(W1)
        if keep is None:
            scores = (W1 / torch.diag(Hinv1)).square().flatten()
            lose = torch.zeros_like(scores, dtype=torch.bool)
            lose[scores.topk(round(sparsity * len(scores)), largest=False).indices] = True
            lose = lose.view_as(W1)
        else:
            lose = ~keep[:, i1:i2]
        for i in range(i2 - i1):
            Err1[:, i] = W1[:, i] * lose[:, i] / Hinv1[i, i]
            W1[:, i + 1 :] -= Err1[:, i : i + 1] @ Hinv1[i : i + 1, i + 1 :]
        W[:, i1:i2] = W1.masked_fill(lose, 0)
        W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
    return W


def sparsegpt__right_without_inverse(weight, hessian, sparsity, blocksize, keep=None):
    """H = VVᵀ with V upper: a block fetches what all before it owe, and 1/U_qq is V_qq."""
    W = weight.double()
    V = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1)
    pruned = W.clone()
    for start in range(0, len(V), blocksize):
        stop = min(start + blocksize, len(V))
        owed = (W - pruned)[:, :start] @ V[:start, start:stop]
        here = W[:, start:stop] + owed @ torch.linalg.inv(V[start:stop, start:stop])
        if keep is None:
            scores = here.abs() * V.diagonal()[start:stop]
            mask = _lowest(scores, round(sparsity * scores.numel()))
        else:
            mask = keep[:, start:stop]
        for q in range(start, stop):
            owed = (W - pruned)[:, :q] @ V[:q, q] / V[q, q]
            pruned[:, q] = (W[:, q] + owed) * mask[:, q - start]
    return pruned.to(weight.dtype)


def sparsegpt__right_numpy(weight, hessian, sparsity, blocksize, keep=None):
    """Optimal Brain Surgeon on what remains, with an inverse for every column."""
    W, H = weight.double().numpy().copy(), hessian.double().numpy()
    mask = np.ones(W.shape, dtype=bool) if keep is None else keep.numpy()
    inverses = [np.linalg.inv(H[q:, q:]) for q in range(len(H))]
    for q, inverse in enumerate(inverses):
        if keep is None and q % blocksize == 0:
            costs = np.array([1 / each[0, 0] for each in inverses[q : q + blocksize]])
            scores = W[:, q : q + blocksize] ** 2 * costs
            order = np.argsort(scores, axis=None)[: round(sparsity * scores.size)]
            rows, places = np.unravel_index(order, scores.shape)
            mask[rows, q + places] = False
        W[:, q:] -= np.outer(W[:, q] * ~mask[:, q] / inverse[0, 0], inverse[0])
        W[~mask[:, q], q] = 0
    return torch.from_numpy(W)


def _choose(now, U, block, sparsity, original):
    scores = (now[:, block] / U.diagonal()[block]) ** 2
    return _lowest(scores, round(sparsity * scores.numel()))


def _blocks(weight, hessian, sparsity, blocksize, keep, choose=_choose):
    """The sweep, with another way to choose the mask of a block."""
    W, U = weight.clone(), _upper(hessian)
    mask = torch.ones_like(W, dtype=torch.bool) if keep is None else keep
    for q in range(W.shape[1]):
        if keep is None and q % blocksize == 0:
            block = slice(q, min(q + blocksize, W.shape[1]))
            mask[:, block] = choose(W, U, block, sparsity, weight)
        error = W[:, q] * ~mask[:, q] / U[q, q]
        W[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return W * mask


def sparsegpt__wrong_blocks_apart(weight, hessian, sparsity, blocksize, keep=None):
    """What a block loses stays its own affair."""
    W, U = weight.clone(), _upper(hessian)
    for start in range(0, W.shape[1], blocksize):
        block = slice(start, min(start + blocksize, W.shape[1]))
        scores = W[:, block] ** 2 / U.diagonal()[block] ** 2
        mask = _lowest(scores, round(sparsity * scores.numel())) if keep is None else keep[:, block]
        W[:, block] = _swept(W[:, block], U[block, block], mask)
    return W


def sparsegpt__wrong_compensated_twice(weight, hessian, sparsity, blocksize, keep=None):
    """Column by column, and at the end of the block once more."""
    W, U = weight.clone(), _upper(hessian)
    for start in range(0, W.shape[1], blocksize):
        stop = min(start + blocksize, W.shape[1])
        scores = W[:, start:stop] ** 2 / U.diagonal()[start:stop] ** 2
        mask = _lowest(scores, round(sparsity * scores.numel())) if keep is None else keep[:, start:stop]
        errors = torch.zeros_like(scores)
        for q in range(start, stop):
            errors[:, q - start] = W[:, q] * ~mask[:, q - start] / U[q, q]
            W[:, q + 1 :] -= torch.outer(errors[:, q - start], U[q, q + 1 :])
        W[:, start:stop] *= mask
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


def sparsegpt__wrong_original_weights(weight, hessian, sparsity, blocksize, keep=None):
    def choose(now, U, block, sparsity, original):
        scores = original[:, block] ** 2 / U.diagonal()[block] ** 2
        return _lowest(scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_whole_layer(weight, hessian, sparsity, blocksize, keep=None):
    """One mask for the layer, before anything is compensated; the blocks have no say."""
    scores = weight**2 / _upper(hessian).diagonal() ** 2
    mask = _lowest(scores, round(sparsity * scores.numel())) if keep is None else keep
    return column_sweep__right_factor(weight, hessian, mask)


def sparsegpt__wrong_rows(weight, hessian, sparsity, blocksize, keep=None):
    """As in Wanda, each row of the block loses the same number."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block] ** 2
        order = scores.argsort(dim=1)[:, : round(sparsity * scores.shape[1])]
        return torch.ones_like(scores, dtype=torch.bool).scatter(1, order, False)

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_threshold(weight, hessian, sparsity, blocksize, keep=None):
    """As the published code: up to and with the threshold, one too many, and more if scores are equal."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block] ** 2
        ordered = scores.flatten().sort().values
        return scores > ordered[min(int(sparsity * len(ordered)), len(ordered) - 1)]

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_ties(weight, hessian, sparsity, blocksize, keep=None):
    """The right number, unless scores are equal."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block] ** 2
        pruned = round(sparsity * scores.numel())
        return scores > (scores.flatten().sort().values[pruned - 1] if pruned else -1)

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_floor(weight, hessian, sparsity, blocksize, keep=None):
    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block] ** 2
        return _lowest(scores, int(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_magnitude(weight, hessian, sparsity, blocksize, keep=None):
    def choose(now, U, block, sparsity, original):
        scores = now[:, block].abs()
        return _lowest(scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_not_squared(weight, hessian, sparsity, blocksize, keep=None):
    """w² over U_qq."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block]
        return _lowest(scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_all_may_move(weight, hessian, sparsity, blocksize, keep=None):
    """Scores of Optimal Brain Surgeon, with the inverse of the whole Hessian."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / torch.linalg.inv(hessian).diagonal()[block]
        return _lowest(scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_largest(weight, hessian, sparsity, blocksize, keep=None):
    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[block] ** 2
        return _lowest(-scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_diagonal_of_the_first_block(weight, hessian, sparsity, blocksize, keep=None):
    """U_qq of the block's place in the block, not in the layer."""

    def choose(now, U, block, sparsity, original):
        scores = now[:, block] ** 2 / U.diagonal()[: block.stop - block.start] ** 2
        return _lowest(scores, round(sparsity * scores.numel()))

    return _blocks(weight, hessian, sparsity, blocksize, keep, choose)


def sparsegpt__wrong_chosen_by_column(weight, hessian, sparsity, blocksize, keep=None):
    """Each column by itself, as if blocksize were 1."""
    return _blocks(weight, hessian, sparsity, 1, keep)


def sparsegpt__wrong_rest_forgotten(weight, hessian, sparsity, blocksize, keep=None):
    """Whole blocks only."""
    whole = weight.shape[1] // blocksize * blocksize
    W, U = weight.clone(), _upper(hessian)
    mask = torch.ones_like(W, dtype=torch.bool) if keep is None else keep
    for q in range(whole):
        if keep is None and q % blocksize == 0:
            mask[:, q : q + blocksize] = _choose(W, U, slice(q, q + blocksize), sparsity, weight)
        W[:, q + 1 :] -= torch.outer(W[:, q] * ~mask[:, q] / U[q, q], U[q, q + 1 :])
    return W * mask


def sparsegpt__wrong_reshaped(weight, hessian, sparsity, blocksize, keep=None):
    """Only where blocksize divides the number of inputs."""
    weight.view(len(weight), -1, blocksize)
    return _blocks(weight, hessian, sparsity, blocksize, keep)


def sparsegpt__wrong_mask_ignored(weight, hessian, sparsity, blocksize, keep=None):
    return _blocks(weight, hessian, sparsity, blocksize, None)


def sparsegpt__wrong_no_compensation(weight, hessian, sparsity, blocksize, keep=None):
    """Masks by score, and no more."""
    W, U = weight.clone(), _upper(hessian)
    for start in range(0, W.shape[1], blocksize):
        block = slice(start, min(start + blocksize, W.shape[1]))
        W[:, block] *= _choose(W, U, block, sparsity, weight) if keep is None else keep[:, block]
    return W


def sparsegpt__wrong_returns_the_mask(weight, hessian, sparsity, blocksize, keep=None):
    return _blocks(weight, hessian, sparsity, blocksize, keep) != 0


def sparsegpt__wrong_keep_changed(weight, hessian, sparsity, blocksize, keep=None):
    keep = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep.logical_not_()
    return _blocks(weight, hessian, sparsity, blocksize, ~keep)


def sparsegpt__wrong_in_place(weight, hessian, sparsity, blocksize, keep=None):
    weight.copy_(_blocks(weight, hessian, sparsity, blocksize, keep))
    return weight


# --- optimality_gap(weight, hessian, pruned, keep)


def _error(weight, hessian, pruned):
    change = weight - pruned
    return ((change @ hessian) * change).sum().item()


def _optimum(weight, hessian, keep):
    best = torch.zeros_like(weight)
    for i, kept in enumerate(keep):
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[i])
    return best


def optimality_gap__right_normal_equations(weight, hessian, pruned, keep):
    best = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    error, least = (((weight - each) @ hessian * (weight - each)).sum() for each in (pruned, best))
    return (error / least).item()


def optimality_gap__right_least_squares(weight, hessian, pruned, keep):
    """‖R(w − ŵ)‖² with H = RᵀR, in float64, row by row."""
    root = torch.linalg.cholesky(hessian.double(), upper=True)
    error = least = 0.0
    for w, p, kept in zip(weight.double(), pruned.double(), keep, strict=True):
        error += (root @ (w - p)).square().sum().item()
        target = root @ w
        solution = torch.linalg.lstsq(root[:, kept], target[:, None]).solution[:, 0]
        least += (root[:, kept] @ solution - target).square().sum().item()
    return error / least


def optimality_gap__right_numpy(weight, hessian, pruned, keep):
    W, H, P, kept = (each.numpy().astype(np.float64) for each in (weight, hessian, pruned, keep.float()))
    best = np.zeros_like(W)
    for i in range(len(W)):
        (places,) = np.nonzero(kept[i])
        best[i, places] = np.linalg.solve(H[np.ix_(places, places)], H[places] @ W[i])
    return float(np.trace((W - P) @ H @ (W - P).T) / np.trace((W - best) @ H @ (W - best).T))


def optimality_gap__right_schur(weight, hessian, pruned, keep):
    """What goes costs wᵀ([H⁻¹]_pp)⁻¹w at least: Optimal Brain Surgeon for many weights of a row."""
    inverse, least = torch.linalg.inv(hessian), 0
    for w, lost in zip(weight, ~keep, strict=True):
        least += w[lost] @ torch.linalg.solve(inverse[lost][:, lost], w[lost])
    change = weight - pruned
    return torch.trace(change @ hessian @ change.T) / least


def optimality_gap__right_stacked(weight, hessian, pruned, keep):
    """All rows in one batch: pruned inputs get a unit row and drop out."""
    W, H = weight.double(), hessian.double()
    both = keep[:, :, None] & keep[:, None, :]
    systems = torch.where(both, H, torch.eye(len(H), dtype=torch.float64))
    best = torch.linalg.solve(systems, (W @ H * keep)[:, :, None])[:, :, 0]
    error, least = (torch.einsum("ri,ij,rj->", W - each, H, W - each) for each in (pruned, best))
    return float(error / least)


def optimality_gap__wrong_no_mask(weight, hessian, pruned, keep):
    """The best weights without a mask are the dense ones: error nothing."""
    best = torch.linalg.solve(hessian, hessian @ weight.T).T
    return _error(weight, hessian, pruned) / max(_error(weight, hessian, best), 1e-12)


def optimality_gap__wrong_mask_alone(weight, hessian, pruned, keep):
    return _error(weight, hessian, pruned) / _error(weight, hessian, weight * keep)


def optimality_gap__wrong_optimum_masked(weight, hessian, pruned, keep):
    """The whole system is solved and its solution masked."""
    best = torch.linalg.solve(hessian, hessian @ weight.T).T * keep
    return _error(weight, hessian, pruned) / _error(weight, hessian, best)


def optimality_gap__wrong_dropped_right_hand_side(weight, hessian, pruned, keep):
    """H_kk ŵ = H_kk w_k: the pruned inputs' share of the right-hand side is forgotten."""
    best = torch.zeros_like(weight)
    for i, kept in enumerate(keep):
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, kept] @ weight[i, kept])
    return _error(weight, hessian, pruned) / _error(weight, hessian, best)


def optimality_gap__wrong_frobenius(weight, hessian, pruned, keep):
    best = _optimum(weight, hessian, keep)
    return ((weight - pruned).norm() / (weight - best).norm()).item() ** 2


def optimality_gap__wrong_mean_of_rows(weight, hessian, pruned, keep):
    best = _optimum(weight, hessian, keep)
    ratios = [_error(weight[i : i + 1], hessian, pruned[i : i + 1]) for i in range(len(weight))]
    least = [_error(weight[i : i + 1], hessian, best[i : i + 1]) for i in range(len(weight))]
    ratios = [ratio / each for ratio, each, kept in zip(ratios, least, keep, strict=True) if not kept.all()]
    return sum(ratios) / len(ratios)


def optimality_gap__wrong_inverse(weight, hessian, pruned, keep):
    return optimality_gap__right_normal_equations(weight, torch.linalg.inv(hessian), pruned, keep)


def optimality_gap__wrong_whole_inverse(weight, hessian, pruned, keep):
    """H is inverted as a whole, and cut to the kept inputs afterwards."""
    inverse, best = torch.linalg.inv(hessian), torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        best[row, kept] = inverse[kept][:, kept] @ (hessian[kept] @ weight[row])
    error, least = (((weight - each) @ hessian * (weight - each)).sum() for each in (pruned, best))
    return float(error / least)


def optimality_gap__wrong_sqrt(weight, hessian, pruned, keep):
    return math.sqrt(optimality_gap__right_least_squares(weight, hessian, pruned, keep))


def optimality_gap__wrong_upside_down(weight, hessian, pruned, keep):
    return 1 / optimality_gap__right_least_squares(weight, hessian, pruned, keep)


def optimality_gap__wrong_minus_one(weight, hessian, pruned, keep):
    return optimality_gap__right_least_squares(weight, hessian, pruned, keep) - 1


def optimality_gap__wrong_relative_error(weight, hessian, pruned, keep):
    return _error(weight, hessian, pruned) / _error(weight, hessian, torch.zeros_like(weight))


def optimality_gap__wrong_one_mask(weight, hessian, pruned, keep):
    """Inputs that the first row with zeros keeps, for all rows."""
    kept = keep[~keep.all(dim=1)][0]
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T
    return _error(weight, hessian, pruned) / _error(weight, hessian, best)


def optimality_gap__wrong_row_by_row(weight, hessian, pruned, keep):
    """A ratio for each row, and no layer."""
    best = _optimum(weight, hessian, keep)
    changes = (weight - pruned, weight - best)
    error, least = (((change @ hessian) * change).sum(dim=1) for change in changes)
    return error / least.clamp(min=1e-12)


def optimality_gap__wrong_in_place(weight, hessian, pruned, keep):
    best = _optimum(weight, hessian, keep)
    pruned -= weight
    best -= weight
    return (((pruned @ hessian) * pruned).sum() / ((best @ hessian) * best).sum()).item()
