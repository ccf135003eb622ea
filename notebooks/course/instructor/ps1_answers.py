"""Answers to problem set 1: right ones in several styles, and wrong ones as students write them.

A function `EXERCISE__right_STYLE` or `EXERCISE__wrong_MISTAKE` stands for one answer; every wrong one has to be caught.
"""

import math

import torch

# --- magnitude_mask(weight, sparsity)


def magnitude_mask__right_topk(weight, sparsity):
    pruned = round(sparsity * weight.numel())
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[weight.abs().flatten().topk(pruned, largest=False).indices] = False
    return keep.view_as(weight)


def magnitude_mask__right_sort(weight, sparsity):
    order = weight.abs().reshape(-1).argsort()
    keep = torch.zeros_like(weight, dtype=torch.bool).reshape(-1)
    keep[order[round(sparsity * len(order)) :]] = True
    return keep.reshape(weight.shape)


def magnitude_mask__right_loop(weight, sparsity):
    rows, columns = weight.shape
    places = sorted((abs(weight[i, j].item()), i, j) for i in range(rows) for j in range(columns))
    keep = torch.full(weight.shape, True)
    for _, i, j in places[: round(sparsity * len(places))]:
        keep[i, j] = False
    return keep


def magnitude_mask__wrong_threshold(weight, sparsity):
    """As the published code: everything up to the threshold goes, however many are equal."""
    scores = weight.abs().flatten().sort().values
    return weight.abs() > scores[min(int(sparsity * len(scores)), len(scores) - 1)]


def magnitude_mask__wrong_ties(weight, sparsity):
    pruned = round(sparsity * weight.numel())
    if pruned == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return ~(weight.abs() <= weight.abs().flatten().sort().values[pruned - 1])


def magnitude_mask__wrong_quantile(weight, sparsity):
    return weight.abs() > weight.abs().flatten().quantile(sparsity)


def magnitude_mask__wrong_sign(weight, sparsity):
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[weight.flatten().argsort()[: round(sparsity * weight.numel())]] = False
    return keep.view_as(weight)


def magnitude_mask__wrong_largest(weight, sparsity):
    keep = torch.zeros(weight.numel(), dtype=torch.bool)
    keep[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = True
    return keep.view_as(weight)


def magnitude_mask__wrong_rows(weight, sparsity):
    pruned = round(sparsity * weight.shape[1])
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(1, weight.abs().argsort(dim=1)[:, :pruned], False)


def magnitude_mask__wrong_floor(weight, sparsity):
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]] = False
    return keep.view_as(weight)


def magnitude_mask__wrong_in_place(weight, sparsity):
    order = weight.abs_().flatten().argsort()
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[order[: round(sparsity * weight.numel())]] = False
    return keep.view_as(weight)


def magnitude_mask__wrong_float(weight, sparsity):
    keep = torch.ones(weight.numel())
    keep[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = 0
    return keep.view_as(weight)


# --- global_magnitude_masks(weights, sparsity)


def global_magnitude_masks__right_concatenated(weights, sparsity):
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort()[: round(sparsity * len(scores))]] = False
    parts = keep.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def global_magnitude_masks__right_loop(weights, sparsity):
    places = []
    for layer, weight in enumerate(weights):
        places += [(value, layer, place) for place, value in enumerate(weight.abs().flatten().tolist())]
    places.sort()
    masks = [torch.ones(weight.shape, dtype=torch.bool) for weight in weights]
    for _, layer, place in places[: round(sparsity * len(places))]:
        masks[layer].view(-1)[place] = False
    return masks


def global_magnitude_masks__right_topk(weights, sparsity):
    scores = torch.hstack([weight.abs().ravel() for weight in weights])
    kept = len(scores) - round(sparsity * len(scores))
    survivors = set(scores.topk(kept).indices.tolist())
    masks, first = [], 0
    for weight in weights:
        flags = [first + place in survivors for place in range(weight.numel())]
        masks.append(torch.tensor(flags).reshape(weight.shape))
        first += weight.numel()
    return tuple(masks)


def global_magnitude_masks__wrong_per_layer(weights, sparsity):
    masks = []
    for weight in weights:
        keep = torch.ones(weight.numel(), dtype=torch.bool)
        keep[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = False
        masks.append(keep.view_as(weight))
    return masks


def global_magnitude_masks__wrong_threshold(weights, sparsity):
    scores = torch.cat([weight.abs().flatten() for weight in weights]).sort().values
    threshold = scores[min(round(sparsity * len(scores)), len(scores) - 1)]
    return [weight.abs() >= threshold for weight in weights]


def global_magnitude_masks__wrong_normalised(weights, sparsity):
    scores = torch.cat([(weight.abs() / weight.abs().mean()).flatten() for weight in weights])
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort()[: round(sparsity * len(scores))]] = False
    parts = keep.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def global_magnitude_masks__wrong_one_tensor(weights, sparsity):
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort()[: round(sparsity * len(scores))]] = False
    return keep


# --- nm_mask(scores, n, m)


def nm_mask__right_topk(scores, n, m):
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1).indices, True).reshape(scores.shape)


def nm_mask__right_ranks(scores, n, m):
    rows, columns = scores.shape
    ranks = scores.view(rows, columns // m, m).argsort(dim=-1).argsort(dim=-1)
    return (ranks >= m - n).view(rows, columns)


def nm_mask__right_loop(scores, n, m):
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for first in range(0, scores.shape[1], m):
            group = scores[row, first : first + m].tolist()
            for place in sorted(range(m), key=lambda index, group=group: group[index])[m - n :]:
                keep[row, first + place] = True
    return keep


def nm_mask__wrong_pruned(scores, n, m):
    """The published code's reading: n of every m go. The same for 2:4 and 4:8."""
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(m - n, dim=1).indices, True).reshape(scores.shape)


def nm_mask__wrong_outputs(scores, n, m):
    if scores.shape[0] % m:
        return torch.zeros_like(scores, dtype=torch.bool)
    groups = scores.T.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1).indices, True).reshape(scores.T.shape).T


def nm_mask__wrong_strided(scores, n, m):
    groups = scores.view(len(scores), m, -1)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1).indices, True).view(scores.shape)


def nm_mask__wrong_ties(scores, n, m):
    groups = scores.reshape(-1, m)
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return (groups >= groups.topk(n, dim=1).values[:, -1:]).reshape(scores.shape)


def nm_mask__wrong_smallest(scores, n, m):
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1, largest=False).indices, True).reshape(scores.shape)


# --- feature_norms(model, name, batches)


def feature_norms__right_pre_hook(model, name, batches):
    layer, total = model.get_submodule(name), 0

    def add(_layer, inputs):
        nonlocal total
        total = total + inputs[0].flatten(0, -2).pow(2).sum(dim=0)

    handle = layer.register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return total.sqrt()


def feature_norms__right_hook(model, name, batches):
    seen = []
    layer = dict(model.named_modules())[name]
    handle = layer.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        handle.remove()
    return torch.cat([tokens.reshape(-1, tokens.shape[-1]) for tokens in seen]).norm(dim=0)


def feature_norms__right_double(model, name, batches):
    squares = torch.zeros(model.get_submodule(name).in_features, dtype=torch.float64)

    def add(_layer, inputs):
        for token in inputs[0].reshape(-1, len(squares)).double():
            squares.add_(token * token)

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.sqrt(squares).float()


def feature_norms__wrong_mean(model, name, batches):
    total, tokens = 0, 0

    def add(_layer, inputs):
        nonlocal total, tokens
        total = total + inputs[0].flatten(0, -2).pow(2).sum(dim=0)
        tokens += inputs[0].flatten(0, -2).shape[0]

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return (total / tokens).sqrt()


def feature_norms__wrong_sum_of_norms(model, name, batches):
    """Norms of the batches added up: right for one batch only."""
    total = 0

    def add(_layer, inputs):
        nonlocal total
        total = total + inputs[0].flatten(0, -2).norm(dim=0)

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return total


def feature_norms__wrong_last_batch(model, name, batches):
    norms = None

    def note(_layer, inputs):
        nonlocal norms
        norms = inputs[0].flatten(0, -2).norm(dim=0)

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    for batch in batches:
        model(batch)
    handle.remove()
    return norms


def feature_norms__wrong_outputs(model, name, batches):
    total = 0

    def add(_layer, _inputs, output):
        nonlocal total
        total = total + output.flatten(0, -2).pow(2).sum(dim=0)

    handle = model.get_submodule(name).register_forward_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return total.sqrt()


def feature_norms__wrong_square(model, name, batches):
    total = 0

    def add(_layer, inputs):
        nonlocal total
        total = total + inputs[0].flatten(0, -2).pow(2).sum(dim=0)

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    return total


def feature_norms__wrong_hook_stays(model, name, batches):
    total = torch.zeros(model.get_submodule(name).in_features)

    def add(_layer, inputs):
        total.add_(inputs[0].flatten(0, -2).pow(2).sum(dim=0))

    model.get_submodule(name).register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    return total.sqrt()


def feature_norms__wrong_model_input(model, name, batches):
    tokens = torch.cat([batch.flatten(0, -2) for batch in batches])
    return tokens.norm(dim=0)


# --- wanda_mask(weight, feature_norm, sparsity)


def wanda_mask__right_sort(weight, feature_norm, sparsity):
    scores = weight.abs() * feature_norm
    order = scores.argsort(dim=1)
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(1, order[:, : round(sparsity * weight.shape[1])], False)


def wanda_mask__right_rows(weight, feature_norm, sparsity):
    rows = []
    for row in weight:
        keep = torch.ones(len(row), dtype=torch.bool)
        keep[(row * feature_norm).abs().topk(round(sparsity * len(row)), largest=False).indices] = False
        rows.append(keep)
    return torch.stack(rows)


def wanda_mask__right_ranks(weight, feature_norm, sparsity):
    ranks = (weight.abs() @ torch.diag(feature_norm)).argsort(dim=1).argsort(dim=1)
    return ranks >= round(sparsity * weight.shape[1])


def wanda_mask__wrong_layer(weight, feature_norm, sparsity):
    scores = (weight.abs() * feature_norm).flatten()
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort()[: round(sparsity * len(scores))]] = False
    return keep.view_as(weight)


def wanda_mask__wrong_no_norm(weight, feature_norm, sparsity):
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(1, weight.abs().argsort(dim=1)[:, : round(sparsity * weight.shape[1])], False)


def wanda_mask__wrong_columns(weight, feature_norm, sparsity):
    order = (weight.abs() * feature_norm).argsort(dim=0)
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(0, order[: round(sparsity * weight.shape[0])], False)


def wanda_mask__wrong_ties(weight, feature_norm, sparsity):
    scores = weight.abs() * feature_norm
    ordered = scores.sort(dim=1).values
    pruned = round(sparsity * weight.shape[1])
    if pruned == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return scores > ordered[:, pruned - 1 : pruned]


def wanda_mask__wrong_squared(weight, feature_norm, sparsity):
    order = (weight.abs() * feature_norm.square()).argsort(dim=1)
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(1, order[:, : round(sparsity * weight.shape[1])], False)


def wanda_mask__wrong_in_place(weight, feature_norm, sparsity):
    order = weight.abs_().mul_(feature_norm).argsort(dim=1)
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter(1, order[:, : round(sparsity * weight.shape[1])], False)


# --- perplexity(batches)


def perplexity__right_cross_entropy(batches):
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        total += (nll * mask[:, 1:]).sum().item()
        count += mask[:, 1:].sum().item()
    return math.exp(total / count)


def perplexity__right_gather(batches):
    losses = []
    for logits, tokens, mask in batches:
        logp = logits.log_softmax(dim=-1)[:, :-1].gather(2, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        losses.append(-logp[mask[:, 1:].bool()])
    return torch.cat(losses).mean().exp()


def perplexity__right_loop(batches):
    losses = []
    for logits, tokens, mask in batches:
        for row in range(len(tokens)):
            for place in range(1, tokens.shape[1]):
                if mask[row, place]:
                    losses.append(-logits[row, place - 1].log_softmax(0)[tokens[row, place]].item())
    return math.exp(math.fsum(losses) / len(losses))


def perplexity__wrong_no_shift(batches):
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        total += (nll * mask).sum().item()
        count += mask.sum().item()
    return math.exp(total / count)


def perplexity__wrong_shifted_back(batches):
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none")
        total += (nll * mask[:, :-1]).sum().item()
        count += mask[:, :-1].sum().item()
    return math.exp(total / count)


def perplexity__wrong_mean_of_means(batches):
    means = []
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        means.append(((nll * mask[:, 1:]).sum() / mask[:, 1:].sum()).item())
    return math.exp(sum(means) / len(means))


def perplexity__wrong_mean_of_perplexities(batches):
    found = []
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        found.append(math.exp(((nll * mask[:, 1:]).sum() / mask[:, 1:].sum()).item()))
    return sum(found) / len(found)


def perplexity__wrong_padding(batches):
    total, count = 0.0, 0
    for logits, tokens, _mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        total += nll.sum().item()
        count += nll.numel()
    return math.exp(total / count)


def perplexity__wrong_count(batches):
    """Divided by all positions, masked or not."""
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        total += (nll * mask[:, 1:]).sum().item()
        count += nll.numel()
    return math.exp(total / count)


def perplexity__wrong_mask_not_shifted(batches):
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        total += (nll * mask[:, :-1]).sum().item()
        count += mask[:, :-1].sum().item()
    return math.exp(total / count)


def perplexity__wrong_no_exp(batches):
    total, count = 0.0, 0
    for logits, tokens, mask in batches:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        total += (nll * mask[:, 1:]).sum().item()
        count += mask[:, 1:].sum().item()
    return total / count
