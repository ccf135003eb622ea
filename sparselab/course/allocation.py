"""Which layers are pruned how much: what is wrong with an allocation, or with the costs that it goes by.

Two exercises of problem set 3. The first is tried on random costs, the second on the bundled model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselab.course import tiny
from sparselab.course.answers import Answer, CheckError
from sparselab.course.values import as_matrix, kind, normal
from sparselab.uncertainty import interval95

_RTOL = 1e-3  # rounding in float32
_OVER_BEST = 0.12  # what an allocation may cost above the best possible; greedy ones stayed below 0.08 in 480 draws
_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
_BUDGETS = (0.7, 0.66, 0.74, 0.6, 0.5, 0.9)
_NATS = 0.002  # what a cost may be off the measured loss: one that is negative by chance may be taken for zero
_WINDOWS = 40  # of the held-out ones of `tiny`, drawn by the seed


def allocate(function: Callable[..., Any], seed: int = 0) -> str:
    """`allocate(costs, sizes, sparsities, budget)`: a sparsity for each layer, at least the budget, cheap in sum.

    Raises:
        CheckError: not a list of such sparsities, the budget missed, dearer than uniform, or far from the best.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    for budget in _BUDGETS:
        table, sizes = _drawn_costs(draw)
        given = answer(table, sizes, list(_SPARSITIES), budget)
        chosen = _as_choices(answer, given, len(sizes))
        pruned = sum(size * _SPARSITIES[choice] for size, choice in zip(sizes, chosen, strict=True)) / sum(sizes)
        place = f"{answer.name} at budget {budget:g}"
        if pruned < budget - 1e-6:
            unweighted = sum(_SPARSITIES[choice] for choice in chosen) / len(chosen)
            hint = ": layers differ in size, and weights are counted" if unweighted > budget - 1e-6 else ""
            raise CheckError(f"{place} prunes {pruned:.4f} of all weights{hint}")
        cost = sum(float(table[layer, choice]) for layer, choice in enumerate(chosen))
        level = next(index for index, sparsity in enumerate(_SPARSITIES) if sparsity >= budget)
        uniform, best = float(table[:, level].double().sum()), _least_cost(table, sizes, budget)
        if cost > uniform * (1 + _RTOL):
            raise CheckError(f"{place} costs {cost:.4g}, more than {_SPARSITIES[level]} everywhere: {uniform:.4g}")
        if cost > best * (1 + _OVER_BEST):
            hint = _wasted(pruned, budget, len(set(chosen)))
            raise CheckError(f"{place} costs {cost:.4g}, {cost / best - 1:.0%} above the best, {best:.4g}{hint}")
    return f"{answer.name}: every budget met, at a cost close to the best."


def costs(function: Callable[..., Any], seed: int = 0) -> str:
    """`costs(errors, energies, losses, measured)`: what each layer costs at each sparsity, to be added up.

    By these costs `tiny` is pruned to 70%, once for each of two draws of calibration text. On their mean it has
    to beat uniform sparsity, by more than the interval over held-out windows, which the seed draws.

    Raises:
        CheckError: not such a matrix, its allocation cannot be told from uniform or is worse, or it is not in nats.
    """
    answer, draw = Answer(function), torch.Generator().manual_seed(seed)
    few = [normal(draw, *shape).abs() + 0.1 for shape in ((5, 3), (5,), (5,))]
    as_matrix(answer, answer(*few, 1), few[0])  # before the model is measured, which takes its time
    windows, differences = torch.randperm(tiny.HELD_OUT, generator=draw)[:_WINDOWS], []
    for number in range(tiny.DRAWS):
        layers = tiny.measured_layers(number)
        given = answer(layers.errors, layers.energies, layers.losses, tiny.MEASURED_AT)
        matrix = as_matrix(answer, given, layers.errors)
        by_cost = tuple(_greedy(matrix.tolist(), layers.sizes, layers.sparsities, tiny.UNIFORM))
        uniform = (tiny.UNIFORM,) * len(layers.sizes)
        differences.append((tiny.heldout_loss(number, by_cost) - tiny.heldout_loss(number, uniform))[windows])
    found = interval95(torch.stack(differences).mean(dim=0))
    said = f"log perplexity minus that of uniform {tiny.UNIFORM:.0%} is {found.mean:+.3f} ± {found.half_width:.3f}"
    if found.high >= 0:
        raise CheckError(f"{answer.name}: {said}, expected below zero{_wrong_cost(matrix, layers)}")
    _check_nats(f"{answer.name}: {said}", matrix, layers)
    each = ", ".join(f"{float(loss.mean()):+.3f}" for loss in differences)
    return f"{answer.name}: {said} (by calibration draw {each})."


def _drawn_costs(draw: torch.Generator, layers: int = 32) -> tuple[Tensor, list[int]]:
    """Convex costs [layers, sparsities] of layers that differ in size and in what a weight of them is worth."""
    sizes = 1000 * 2 ** torch.randint(0, 4, (layers,), generator=draw)
    steps = (torch.rand(layers, len(_SPARSITIES), generator=draw) + 0.05).sort(dim=1).values
    steps *= 1.5 ** torch.arange(len(_SPARSITIES))
    return steps.cumsum(1) * normal(draw, layers, 1).exp() * sizes[:, None].sqrt(), sizes.tolist()


def _as_choices(answer: Answer, given: Any, layers: int) -> list[int]:
    try:
        chosen = [float(sparsity) for sparsity in given]
    except (TypeError, ValueError):
        raise CheckError(f"{answer.name} returns {kind(given)}, expected a list of sparsities") from None
    if len(chosen) != layers:
        raise CheckError(f"{answer.name} returns {len(chosen)} numbers, expected one for each of {layers} layers")
    indices = [[index for index, s in enumerate(_SPARSITIES) if math.isclose(s, one, rel_tol=1e-6)] for one in chosen]
    if odd := [sparsity for sparsity, index in zip(chosen, indices, strict=True) if not index]:
        raise CheckError(f"{answer.name} gives a layer {odd[0]:g}, expected one of {list(_SPARSITIES)}")
    return [index[0] for index in indices]


def _least_cost(table: Tensor, sizes: Sequence[int], budget: float) -> float:
    """The best possible: of all ways to have pruned so many weights of the first layers, only the cheapest counts."""
    cheapest = {0: 0.0}
    for size, row in zip(sizes, table.tolist(), strict=True):
        found: dict[int, float] = {}
        for pruned, cost in cheapest.items():
            for sparsity, more in zip(_SPARSITIES, row, strict=True):
                total = pruned + round(size * sparsity)
                found[total] = min(found.get(total, math.inf), cost + more)
        cheapest = found
    return min(cost for pruned, cost in cheapest.items() if pruned >= budget * sum(sizes) - 1e-6)


def _greedy(
    table: Sequence[Sequence[float]], sizes: Sequence[int], sparsities: Sequence[float], budget: float
) -> list[float]:
    """Raise the sparsity of a layer, again and again, wherever a pruned weight costs least."""
    chosen = [0] * len(sizes)
    while sum(n * sparsities[i] for n, i in zip(sizes, chosen, strict=True)) < budget * sum(sizes) - 1e-6:
        _, layer, choice = min(
            ((table[layer][to] - table[layer][now]) / (sizes[layer] * (sparsities[to] - sparsities[now])), layer, to)
            for layer, now in enumerate(chosen)
            for to in range(now + 1, len(sparsities))
        )
        chosen[layer] = choice
    return [sparsities[index] for index in chosen]


def _wasted(pruned: float, budget: float, levels: int) -> str:
    if levels == 1:
        return ": the same sparsity everywhere"
    if pruned > budget + 0.03:
        return f": it prunes {pruned:.4f}, more than was asked for"
    return ": a weight pruned should cost the same everywhere, so compare (cost added) / (weights added)"


def _wrong_cost(matrix: Tensor, layers: tiny.Layers) -> str:
    errors, losses = layers.errors.double(), layers.losses.double()[:, None]
    relative = errors / layers.energies.double()[:, None]
    guesses = {
        "these are layer errors, each in units of its own layer's outputs": errors,
        "these are relative errors, as if each layer mattered alike": relative,
        "losses times errors, in units of nobody: is a layer's cost the measured loss where it was measured?": (
            losses * errors
        ),
        "losses times relative errors: is a layer's cost the measured loss where it was measured?": losses * relative,
        "the cost does not grow with the sparsity": matrix[:, :1].expand_as(matrix),
    }
    similar = (guess for guess, costs in guesses.items() if _proportional(matrix, costs))
    return f": {guess}" if (guess := next(similar, "")) else ""


def _check_nats(said: str, matrix: Tensor, layers: tiny.Layers) -> None:
    away = (matrix[:, tiny.MEASURED_AT] - layers.losses).abs()
    if away.max() > _NATS:
        layer = int(away.argmax())
        cost = f"{matrix[layer, tiny.MEASURED_AT]:.4g}"
        raise CheckError(
            f"{said}, but {layers.names[layer]} costs {cost} where its loss was measured "
            f"as {layers.losses[layer]:.4g}{_wrong_cost(matrix, layers)}"
        )


def _proportional(one: Tensor, other: Tensor) -> bool:
    ratios = one / other
    return bool((ratios / ratios.flatten().median() - 1).abs().max() < _RTOL)
