"""Selects the components to keep, in one ranking over all layers of the model (Algorithm 1 of Mao et al., 2024).

Pure functions on tensors. To add a selection rule, write another function with the signature of
:func:`select_within_budget`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def select_components(
    scores: Mapping[str, Tensor], num_keep: int, min_rank: int = 0, max_rank: int | None = None
) -> dict[str, Tensor]:
    """Keep exactly the ``num_keep`` components with the highest scores of the whole model.

    Equivalent to :func:`select_within_budget` where every component costs 1. The sum of the kept scores is the largest
    possible under the bounds.

    Args:
        scores: layer name -> scores, shape ``(r,)``, any floating dtype; compared in float64 on the CPU.
        num_keep: components to keep over all layers.
        min_rank: least number of components that every layer keeps.
        max_rank: most components that a layer may keep; ``None`` for no bound.

    Returns:
        Layer name -> boolean mask of shape ``(r,)`` on the CPU, True where the component is kept.

    Raises:
        ValueError: a score is not finite, or no selection fits the numbers.
    """
    return select_within_budget(scores, dict.fromkeys(scores, 1), num_keep, min_rank, max_rank)


def select_within_budget(
    scores: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 0,
    max_rank: int | None = None,
    eligible: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep the components with the highest score per cost, up to the budget.

    All components of all layers compete. The best ``min_rank`` components of each layer are reserved. The others are
    taken in the order of score per cost until one does not fit; after it, every component that still fits is taken in
    the same order. A fixed total order breaks ties (score per cost, then layer name, then index within the layer). The
    result therefore depends neither on the order of the mapping nor on the device.

    Guarantee: the largest sum of scores under a budget is a knapsack problem. The order of score per cost solves its
    relaxation, in which components can be split. The kept sum is therefore below the optimum by at most the score of
    the first component that did not fit (by nothing where all costs are equal). The unspent budget is less than the
    cost of any eligible component that was pruned. A score below 0 counts as 0 in this guarantee: such components come
    after all others and fill the remaining budget, those with the least harm per cost first.

    Args:
        scores: layer name -> scores, shape ``(r,)``, any floating dtype; compared in float64 on the CPU.
        costs: layer name -> cost of one component of the layer, at least 1, in the units of the budget.
        budget: largest total cost of the kept components.
        min_rank: least number of components that every layer keeps.
        max_rank: most components that a layer may keep; ``None`` for no bound.
        eligible: layer name -> boolean mask of shape ``(r,)``, False where the component must not be kept; ``None``
            for all.

    Returns:
        Layer name -> boolean mask of shape ``(r,)`` on the CPU, True where the component is kept.

    Raises:
        ValueError: a score is not finite, a cost is not positive, or no selection fits the numbers.
    """
    names = sorted(scores)
    sizes = {name: scores[name].numel() for name in names}
    _check_feasible(sizes, costs, budget, min_rank, max_rank)
    for name in names:
        if not torch.isfinite(scores[name]).all():
            raise ValueError(f"layer {name} has a non-finite score: {scores[name].tolist()}")
    usable = {name: torch.ones(sizes[name], dtype=torch.bool) if eligible is None else eligible[name] for name in names}
    allowed = torch.cat([usable[name].cpu() for name in names])
    flat = torch.cat([scores[name].detach().double().cpu() for name in names])
    place = torch.cat([_places_in_layer(scores[name], usable[name].cpu()) for name in names])
    cost = torch.cat([torch.full((sizes[name],), costs[name]) for name in names])
    # A stable descending sort keeps the fixed order of ties.
    order = torch.sort(flat / cost, descending=True, stable=True).indices
    order = order[(allowed & (place < (max_rank if max_rank is not None else max(sizes.values()))))[order]]
    reserved = place[order] < min_rank
    order = torch.cat([order[reserved], order[~reserved]])
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[_fill(order, cost[order], budget)] = True
    return dict(zip(names, torch.split(keep, [sizes[name] for name in names]), strict=True))


def _fill(order: Tensor, cost: Tensor, budget: int) -> Tensor:
    """Entries of ``order`` that are taken: one after the other, each that fits the remaining budget."""
    prefix = int((cost.cumsum(0) <= budget).sum())
    taken = [order[:prefix]]
    left = budget - int(cost[:prefix].sum())
    rest, rest_cost = order[prefix:], cost[prefix:]
    while (fits := rest_cost <= left).any():
        first = int(fits.int().argmax())
        taken.append(rest[first : first + 1])
        left -= int(rest_cost[first])
        rest, rest_cost = rest[first + 1 :], rest_cost[first + 1 :]
    return torch.cat(taken)


def _places_in_layer(scores: Tensor, eligible: Tensor) -> Tensor:
    """Place of each component within its layer, 0 for the best. Ties go by index; ineligible components come last.
    Shape ``(r,)``, int64."""
    ranked = scores.detach().double().cpu().masked_fill(~eligible, -torch.inf)
    order = torch.sort(ranked, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    return places


def _check_feasible(
    sizes: Mapping[str, int], costs: Mapping[str, int], budget: int, min_rank: int, max_rank: int | None
) -> None:
    if not sizes:
        raise ValueError("there are no layers to select components from")
    for name in sizes:
        if costs[name] < 1:
            raise ValueError(f"a component of layer {name} costs {costs[name]}, but must cost at least 1")
    if min_rank < 0 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"need 0 <= min_rank <= max_rank, got min_rank {min_rank} and max_rank {max_rank}")
    smallest = min(sizes.values())
    if min_rank > smallest:
        raise ValueError(f"min_rank is {min_rank}, but the smallest layer has {smallest} components")
    least = min_rank * sum(costs[name] for name in sizes)
    most = sum(costs[name] * (size if max_rank is None else min(size, max_rank)) for name, size in sizes.items())
    if not least <= budget <= most:
        total = sum(costs[name] * size for name, size in sizes.items())
        unit = "components" if total == sum(sizes.values()) else "parameters of components"
        raise ValueError(
            f"cannot keep {budget} of {total} {unit}: {len(sizes)} layers with min_rank {min_rank} "
            f"and max_rank {max_rank} admit {least} to {most}; change target_rank, min_rank or max_rank"
        )
