"""Answers to problem set 3: right ones in several styles, and wrong ones as students write them.

A function `EXERCISE__right_STYLE` or `EXERCISE__wrong_MISTAKE` stands for one answer; every wrong one has to be caught.
A function `table_right_STYLE` or `table_wrong_MISTAKE` makes of the true table of a sweep what is handed in.
"""

import math
import statistics

import numpy as np
import pandas as pd
import torch

T95 = [math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]

# --- interval(values)


def interval__right_statistics(values):
    mean = statistics.mean(values)
    return mean, T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def interval__right_numpy(values):
    values = np.array(values)
    return values.mean(), T95[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))


def interval__right_torch(values):
    values = torch.tensor(values)
    return [values.mean(), T95[len(values) - 1] * values.std() / len(values) ** 0.5]


def interval__right_loop(values):
    mean = 0.0
    for value in values:
        mean += value / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, T95[len(values) - 1] * math.sqrt(squares / (len(values) - 1) / len(values))


def interval__right_pandas(values):
    series = pd.Series(values)
    return series.mean(), T95[series.size - 1] * series.sem()


def interval__wrong_population(values):
    return np.mean(values), T95[len(values) - 1] * np.std(values) / math.sqrt(len(values))


def interval__wrong_normal(values):
    return np.mean(values), 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))


def interval__wrong_freedom(values):
    return np.mean(values), T95[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values))


def interval__wrong_no_root(values):
    return np.mean(values), T95[len(values) - 1] * np.std(values, ddof=1)


def interval__wrong_divided_by_n(values):
    return np.mean(values), T95[len(values) - 1] * np.std(values, ddof=1) / len(values)


def interval__wrong_standard_error(values):
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


def interval__wrong_variance(values):
    return np.mean(values), np.var(values, ddof=1)


def interval__wrong_whole_width(values):
    return np.mean(values), 2 * T95[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))


def interval__wrong_ends(values):
    mean, half = interval__right_statistics(values)
    return mean - half, mean + half


def interval__wrong_half_alone(values):
    return T95[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))


# --- paired_difference(table, a, b)


def paired_difference__right_pivot(table, a, b):
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity"))
    return interval__right_pandas((logs[b] - logs[a]).dropna().tolist())


def paired_difference__right_merge(table, a, b):
    both = table[table.method == a].merge(table[table.method == b], on="seed")
    return interval__right_numpy(np.log(both.perplexity_y / both.perplexity_x))


def paired_difference__right_dicts(table, a, b):
    found = {a: {}, b: {}}
    for _, row in table.iterrows():
        if row.method in found:
            found[row.method][row.seed] = math.log(row.perplexity)
    return interval__right_statistics([found[b][seed] - found[a][seed] for seed in found[a] if seed in found[b]])


def paired_difference__right_index(table, a, b):
    logs = np.log(table.set_index(["method", "seed"]).perplexity)
    return interval__right_torch((logs.loc[b] - logs.loc[a]).dropna().tolist())


def paired_difference__wrong_unpaired(table, a, b):
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity"))[[a, b]].dropna()
    spread = math.sqrt((logs[a].var() + logs[b].var()) / len(logs))
    return (logs[b] - logs[a]).mean(), T95[len(logs) - 1] * spread


def paired_difference__wrong_seeds_of_all(table, a, b):
    """Seeds that a third method lacks are dropped as well."""
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity")).dropna()
    return interval__right_pandas((logs[b] - logs[a]).tolist())


def paired_difference__wrong_sum_of_halves(table, a, b):
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity"))[[a, b]].dropna()
    halves = [interval__right_pandas(logs[name].tolist())[1] for name in (a, b)]
    return (logs[b] - logs[a]).mean(), sum(halves)


def paired_difference__wrong_order(table, a, b):
    logs = [np.log(table[table.method == name].perplexity.to_numpy()) for name in (a, b)]
    return interval__right_numpy(logs[1] - logs[0])


def paired_difference__wrong_sign(table, a, b):
    return paired_difference__right_pivot(table, b, a)


def paired_difference__wrong_perplexity(table, a, b):
    both = table.pivot(index="seed", columns="method", values="perplexity")
    return interval__right_pandas((both[b] - both[a]).dropna().tolist())


def paired_difference__wrong_ratio(table, a, b):
    both = table.pivot(index="seed", columns="method", values="perplexity")
    return interval__right_pandas((both[b] / both[a]).dropna().tolist())


def paired_difference__wrong_unmatched(table, a, b):
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity"))
    return logs[b].mean() - logs[a].mean(), interval__right_pandas((logs[b] - logs[a]).dropna().tolist())[1]


def paired_difference__wrong_counted(table, a, b):
    """Seeds that only one of the two has are counted, though they give no difference."""
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity"))[[a, b]].dropna(how="all")
    difference = logs[b] - logs[a]
    return difference.mean(), T95[len(difference) - 1] * difference.std() / math.sqrt(len(difference))


def paired_difference__wrong_filled(table, a, b):
    logs = np.log(table.pivot(index="seed", columns="method", values="perplexity")).fillna(0)
    return interval__right_pandas((logs[b] - logs[a]).tolist())


def paired_difference__wrong_in_place(table, a, b):
    table["perplexity"] = np.log(table.perplexity)
    logs = table.pivot(index="seed", columns="method", values="perplexity")
    return interval__right_pandas((logs[b] - logs[a]).dropna().tolist())


# --- best_settings(table)


def best_settings__right_pivot(table):
    found = {}
    for nsamples, runs in table.groupby("nsamples"):
        logs = np.log(runs.pivot(index="seed", columns="percdamp", values="perplexity"))
        intervals = logs.sub(logs[logs.mean().idxmin()], axis=0).agg(lambda column: interval__right_pandas(column))
        found[nsamples] = [percdamp for percdamp in logs if abs(intervals[percdamp][0]) <= intervals[percdamp][1]]
    return found


def best_settings__right_loop(table):
    logs = {}
    for _, row in table.iterrows():
        logs.setdefault(row.nsamples, {}).setdefault(row.percdamp, {})[row.seed] = math.log(row.perplexity)
    chosen = {}
    for nsamples, of in logs.items():
        best = min(of, key=lambda percdamp, of=of: statistics.mean(of[percdamp].values()))
        chosen[int(nsamples)] = []
        for percdamp in sorted(of):
            difference = [of[percdamp][seed] - of[best][seed] for seed in of[best]]
            mean, half = interval__right_statistics(difference)
            if mean - half <= 0 <= mean + half:
                chosen[int(nsamples)].append(percdamp)
    return chosen


def best_settings__right_arrays(table):
    ordered = table.sort_values(["nsamples", "percdamp", "seed"])
    sizes, percdamps = (sorted(ordered[name].unique()) for name in ("nsamples", "percdamp"))
    logs = torch.tensor(ordered.perplexity.tolist(), dtype=torch.float64).log().view(len(sizes), len(percdamps), -1)
    seeds = logs.shape[-1]
    best = logs.mean(-1).argmin(1)
    difference = logs - logs[torch.arange(len(sizes)), best][:, None]
    half = T95[seeds - 1] * difference.std(-1) / math.sqrt(seeds)
    same = (difference.mean(-1).abs() <= half).tolist()
    return {
        n: [p for p, alike in zip(percdamps, row, strict=True) if alike] for n, row in zip(sizes, same, strict=True)
    }


def _by_interval(table, intervals_meet):
    found = {}
    for nsamples, runs in table.groupby("nsamples"):
        logs = np.log(runs.pivot(index="seed", columns="percdamp", values="perplexity"))
        found[nsamples] = [p for p in logs if intervals_meet(logs[p], logs[logs.mean().idxmin()])]
    return found


def best_settings__wrong_lowest(table):
    means = table.groupby(["nsamples", "percdamp"]).perplexity.mean()
    return {nsamples: [of_n.idxmin()[1]] for nsamples, of_n in means.groupby("nsamples")}


def best_settings__wrong_one_seed(table):
    first = table[table.seed == table.seed.min()].set_index("percdamp")
    return {nsamples: [of_n.perplexity.idxmin()] for nsamples, of_n in first.groupby("nsamples")}


def best_settings__wrong_overlap(table):
    def meet(one, best):
        (mean, half), (lowest, other) = interval__right_pandas(one), interval__right_pandas(best)
        return mean - half <= lowest + other

    return _by_interval(table, meet)


def best_settings__wrong_unpaired(table):
    def meet(one, best):
        return one.mean() - best.mean() <= T95[len(one) - 1] * math.sqrt((one.var() + best.var()) / len(one))

    return _by_interval(table, meet)


def best_settings__wrong_pooled(table):
    best = np.log(table.perplexity).groupby(table.percdamp).mean().idxmin()
    found = {}
    for nsamples, runs in table.groupby("nsamples"):
        logs = np.log(runs.pivot(index="seed", columns="percdamp", values="perplexity"))
        intervals = {p: interval__right_pandas((logs[p] - logs[best]).tolist()) for p in logs}
        found[nsamples] = [p for p, (mean, half) in intervals.items() if abs(mean) <= half]
    return found


def best_settings__wrong_normal(table):
    def meet(one, best):
        difference = one - best
        return abs(difference.mean()) <= 1.96 * difference.sem()

    return _by_interval(table, meet)


def best_settings__wrong_without_best(table):
    def meet(one, best):
        mean, half = interval__right_pandas(one - best)
        return 0 < mean <= half

    return _by_interval(table, meet)


def best_settings__wrong_unsorted(table):
    return {n: percdamps[::-1] for n, percdamps in best_settings__right_pivot(table).items()}


def best_settings__wrong_by_percdamp(table):
    found = {}
    for nsamples, percdamps in best_settings__right_pivot(table).items():
        for percdamp in percdamps:
            found.setdefault(percdamp, []).append(nsamples)
    return found


def best_settings__wrong_in_place(table):
    table.sort_values(["nsamples", "percdamp", "seed"], inplace=True)
    return best_settings__right_pivot(table)


# --- allocate(costs, sizes, sparsities, budget)


def _cheapest_first(costs, sizes, sparsities, budget, weights):
    chosen = [0] * len(sizes)

    def price(step):
        layer, choice = step
        more = costs[layer][choice] - costs[layer][chosen[layer]]
        return more / (weights[layer] * (sparsities[choice] - sparsities[chosen[layer]]))

    while sum(n * sparsities[i] for n, i in zip(sizes, chosen, strict=True)) < budget * sum(sizes) - 1e-6:
        steps = [(layer, i) for layer in range(len(sizes)) for i in range(chosen[layer] + 1, len(sparsities))]
        layer, choice = min(steps, key=price)
        chosen[layer] = choice
    return chosen


def allocate__right_greedy(costs, sizes, sparsities, budget):
    chosen = _cheapest_first(costs.tolist(), sizes, sparsities, budget, sizes)
    return [sparsities[i] for i in chosen]


def allocate__right_steps(costs, sizes, sparsities, budget):
    """All steps sorted once by price: right because prices rise from step to step of a layer."""
    prices = costs.diff(dim=1) / torch.outer(torch.tensor(sizes), torch.tensor(sparsities).diff())
    chosen = torch.zeros(len(sizes), dtype=torch.long)
    levels, weights = torch.tensor(sparsities, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    for step in prices.flatten().argsort():
        if (weights * levels[chosen]).sum() >= budget * weights.sum() - 1e-6:
            break
        chosen[step // prices.shape[1]] += 1
    return [sparsities[i] for i in chosen]


def allocate__right_multiplier(costs, sizes, sparsities, budget):
    """Bisect the price of a weight: each layer then takes what is cheapest for itself."""
    weights = np.outer(sizes, sparsities)
    low, high = 0.0, 1e6
    for _ in range(100):
        price = (low + high) / 2
        chosen = (costs.double().numpy() - price * weights).argmin(axis=1)
        reached = weights[np.arange(len(sizes)), chosen].sum() >= budget * sum(sizes) - 1e-6
        low, high = (low, price) if reached else (price, high)
    chosen = (costs.double().numpy() - high * weights).argmin(axis=1)
    return [sparsities[i] for i in chosen]


def allocate__right_exact(costs, sizes, sparsities, budget):
    """Dynamic programming over how many weights are pruned."""
    ways = {0: (0.0, [])}
    for size, row in zip(sizes, costs.tolist(), strict=True):
        found = {}
        for pruned, (cost, chosen) in ways.items():
            for sparsity, more in zip(sparsities, row, strict=True):
                total = pruned + round(size * sparsity)
                if total not in found or found[total][0] > cost + more:
                    found[total] = (cost + more, [*chosen, sparsity])
        ways = found
    return min(way for pruned, way in ways.items() if pruned >= budget * sum(sizes) - 1e-6)[1]


def allocate__wrong_uniform(costs, sizes, sparsities, budget):
    return [min(s for s in sparsities if s >= budget)] * len(sizes)


def allocate__wrong_budget_missed(costs, sizes, sparsities, budget):
    """Stops before the step that would go over the budget."""
    best = [0] * len(sizes)
    for price in np.geomspace(1e-9, 1e3, 400):
        weights = np.outer(sizes, sparsities)
        chosen = (costs.double().numpy() - price * weights).argmin(axis=1)
        if weights[np.arange(len(sizes)), chosen].sum() > budget * sum(sizes) - 1:
            break
        best = chosen
    return [sparsities[i] for i in best]


def allocate__wrong_sizes_ignored(costs, sizes, sparsities, budget):
    chosen = _cheapest_first(costs.tolist(), sizes, sparsities, budget, [1] * len(sizes))
    return [sparsities[i] for i in chosen]


def allocate__wrong_mean_sparsity(costs, sizes, sparsities, budget):
    chosen = _cheapest_first(costs.tolist(), [1] * len(sizes), sparsities, budget, sizes)
    return [sparsities[i] for i in chosen]


def allocate__wrong_cheapest_to_the_top(costs, sizes, sparsities, budget):
    order = (costs[:, -1] / torch.tensor(sizes)).argsort().tolist()
    chosen = [sparsities[0]] * len(sizes)
    for layer in order:
        if sum(n * s for n, s in zip(sizes, chosen, strict=True)) >= budget * sum(sizes) - 1e-6:
            break
        chosen[layer] = sparsities[-1]
    return chosen


def allocate__wrong_relative(costs, sizes, sparsities, budget):
    relative = costs / costs[:, -1:]
    return [sparsities[i] for i in _cheapest_first(relative.tolist(), sizes, sparsities, budget, sizes)]


def allocate__wrong_dearest_first(costs, sizes, sparsities, budget):
    chosen = _cheapest_first((-costs.flip(0)).tolist(), sizes, sparsities, budget, sizes)
    return [sparsities[i] for i in chosen]


def allocate__wrong_equal_cost(costs, sizes, sparsities, budget):
    """Every layer up to the same cost."""
    for limit in costs.flatten().sort().values.tolist():
        chosen = [max(int((row <= limit).sum()) - 1, 0) for row in costs]
        if sum(n * sparsities[i] for n, i in zip(sizes, chosen, strict=True)) >= budget * sum(sizes) - 1e-6:
            break
    return [sparsities[i] for i in chosen]


def allocate__wrong_indices(costs, sizes, sparsities, budget):
    return _cheapest_first(costs.tolist(), sizes, sparsities, budget, sizes)


def allocate__wrong_in_place(costs, sizes, sparsities, budget):
    costs -= costs[:, :1].clone()
    return allocate__right_greedy(costs, sizes, sparsities, budget)


# --- costs(errors, energies, losses, measured)


def costs__right_broadcast(errors, energies, losses, measured):
    return losses[:, None] * errors / errors[:, measured, None]


def costs__right_loop(errors, energies, losses, measured):
    table = torch.zeros(errors.shape, dtype=torch.float64)
    for layer, row in enumerate(errors):
        for index, error in enumerate(row):
            table[layer, index] = losses[layer] * error / row[measured]
    return table


def costs__right_relative_first(errors, energies, losses, measured):
    """Relative or absolute errors come to the same: what they are relative to drops out."""
    relative = errors / energies.unsqueeze(1)
    return torch.diag(losses / relative[:, measured]) @ relative


def costs__right_numpy(errors, energies, losses, measured):
    growth = errors.numpy() / errors.numpy()[:, [measured]]
    return torch.from_numpy(np.einsum("l,lk->lk", losses.numpy(), growth))


def costs__wrong_errors(errors, energies, losses, measured):
    return errors


def costs__wrong_relative(errors, energies, losses, measured):
    return errors / energies[:, None]


def costs__wrong_times_relative(errors, energies, losses, measured):
    return losses[:, None] * errors / energies[:, None]


def costs__wrong_flat(errors, energies, losses, measured):
    return losses[:, None].expand_as(errors).clone()


def costs__wrong_column_mean(errors, energies, losses, measured):
    return losses[:, None] * errors / errors.mean(dim=0)


def costs__wrong_divided(errors, energies, losses, measured):
    return errors / errors[:, measured, None] / losses.clamp(min=1e-3)[:, None]


def costs__wrong_sign(errors, energies, losses, measured):
    return -losses[:, None] * errors / errors[:, measured, None]


def costs__wrong_shape(errors, energies, losses, measured):
    return losses * errors[:, measured] / energies


def costs__wrong_transposed(errors, energies, losses, measured):
    return losses * (errors / errors[:, measured, None]).T


def costs__wrong_in_place(errors, energies, losses, measured):
    errors *= (losses / errors[:, measured])[:, None]
    return errors


# --- results.csv, from the true table of a sweep


def table_right_as_it_is(table):
    return table


def table_right_shuffled(table):
    return table.sample(frac=1, random_state=0)


def table_right_more_columns(table):
    return table.assign(student="me", bits=np.log2(table.perplexity))[[*reversed(table.columns), "student", "bits"]]


def table_right_less_precise(table):
    return table.assign(perplexity=table.perplexity.round(6), ratio=table.ratio.round(8))


def table_wrong_one_seed(table):
    return table[table.seed == table.seed.min()]


def table_wrong_copied(table):
    first = table[table.seed == table.seed.min()]
    return pd.concat([first.assign(seed=seed) for seed in table.seed.unique()])


def table_wrong_made_up(table):
    perplexities = 20 + np.arange(len(table)) / 100
    return table.assign(perplexity=perplexities, ratio=perplexities / 11)


def table_wrong_better(table):
    """A perplexity improved by hand, the ratio forgotten."""
    return table.assign(perplexity=table.perplexity.where(table.index > 0, 0.97 * table.perplexity))


def table_wrong_percent(table):
    return table.assign(sparsity=100 * table.sparsity)


def table_wrong_left_out(table):
    return table.drop(index=table.index[-1])


def table_wrong_other_seeds(table):
    return table.assign(seed=table.seed + 3 * (table.method == "sparsegpt"))


def table_wrong_failed(table):
    failed = table.index == table.index[-1]
    return table.assign(
        failure=np.where(failed, "model.layers.0: not positive definite", ""),
        perplexity=table.perplexity.mask(failed),
        ratio=table.ratio.mask(failed),
    )


def table_wrong_twice(table):
    return pd.concat([table, table.tail(1)])


def table_wrong_other_sparsity(table):
    """Runs at another sparsity, relabelled."""
    return table.assign(perplexity=0.9 * table.perplexity, ratio=0.9 * table.ratio)


def table_wrong_methods_swapped(table):
    return table.assign(method=table.method.map({"wanda": "sparsegpt", "sparsegpt": "wanda"}))


def table_wrong_other_windows(table):
    return table.assign(eval_nsamples=400)


def table_wrong_few_columns(table):
    return table[["method", "seed", "perplexity"]]
