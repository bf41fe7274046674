"""Moves components from where they help least to layers that lost none, at a constant budget (ALoRA, Liu et al., NAACL
2024).

Pure functions on tensors. Every layer has slots; some of them hold a live component. Pruning a component frees its
slot, and a new component takes a free slot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MovedComponents:
    """The components that an event removes and adds; no component is in both.

    Attributes:
        pruned: layer name -> boolean mask of shape ``(slots,)`` on the CPU, True where a component is removed.
        grown: layer name -> boolean mask of the same kind, True where a new component starts in a free slot.
    """

    pruned: Mapping[str, Tensor]
    grown: Mapping[str, Tensor]


def move_components(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    num_moved: int,
    min_rank: int = 0,
) -> MovedComponents:
    """Prune the lowest components of the whole model, and give their budget to the layers that lost none.

    The layers that lost none take turns, the one with the highest mean score first. Each gets one component a turn, as
    long as it has a free slot and the budget allows it: 8 components for three layers are 3, 3 and 2. Layers without
    a component have no mean score and come last. Scores may be negative, since only the order of scores and of their
    means counts. Ties are broken by layer name, then by index within the layer.

    Guarantee: if the live components spend the budget before the event, they spend it afterwards too: they cost at most
    the budget, and less than one component of the most expensive layer is unspent. Where the layers that lost none
    have too few free slots for this, or no such layer exists, fewer than ``num_moved`` components are moved: the most
    for which the guarantee holds, possibly none. (The paper has no slots; its number of components shrinks where every
    layer lost one.)

    Args:
        scores: layer name -> scores, shape ``(slots,)``, any floating dtype; scores of free slots are ignored.
        alive: layer name -> boolean mask of shape ``(slots,)``, True where a component is alive.
        costs: layer name -> cost of one component of the layer, at least 1, in the units of the budget.
        budget: largest total cost of the components.
        num_moved: most components to prune.
        min_rank: least number of components that a layer keeps, if it has that many.

    Raises:
        ValueError: a score is not finite, or the live components do not spend the budget.
    """
    names = sorted(scores)
    alive = {name: alive[name].cpu() for name in names}
    ranked = {name: scores[name].detach().double().cpu() for name in names}
    for name in names:
        if not torch.isfinite(ranked[name][alive[name]]).all():
            raise ValueError(f"layer {name} has a non-finite score: {ranked[name].tolist()}")
    left = budget - sum(costs[name] * int(alive[name].sum()) for name in names)
    unit = max(costs[name] for name in names)
    if not 0 <= left < unit:
        raise ValueError(
            f"the components cost {budget - left}, but must cost at most the budget {budget}, and more than {unit} "
            "less than it, before some of them are moved"
        )
    lowest = _lowest_first(ranked, alive, min_rank)
    free = {name: int((~alive[name]).sum()) for name in names}
    means = {name: float(ranked[name][alive[name]].mean()) if alive[name].any() else -math.inf for name in names}
    best = sorted(names, key=lambda name: (-means[name], name))
    for count in range(min(num_moved, len(lowest)), 0, -1):
        lost = {name for name, _ in lowest[:count]}
        freed = left + sum(costs[name] for name, _ in lowest[:count])
        given, unspent = in_turns([name for name in best if name not in lost], free, costs, freed)
        if unspent < unit:
            pruned = {name: torch.zeros_like(alive[name]) for name in names}
            for name, index in lowest[:count]:
                pruned[name][index] = True
            return MovedComponents(pruned=pruned, grown={name: first_free(alive[name], given[name]) for name in names})
    nothing = {name: torch.zeros_like(alive[name]) for name in names}
    return MovedComponents(pruned=nothing, grown=nothing)


def first_free(alive: Tensor, count: int) -> Tensor:
    """The first ``count`` slots without a component, as a boolean mask of the same shape ``(slots,)``."""
    free = ~alive
    return free & (free.cumsum(0) <= count)


def _lowest_first(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], min_rank: int) -> list[tuple[str, int]]:
    """(layer, index) of all components that may be pruned, the lowest score first."""
    found: list[tuple[float, str, int]] = []
    for name, values in scores.items():
        indices = alive[name].nonzero().flatten().tolist()
        own = sorted((float(values[index]), name, index) for index in indices)
        found += own[: max(0, len(own) - min_rank)]
    return [(name, index) for _, name, index in sorted(found)]


def in_turns(
    order: Sequence[str], free: Mapping[str, int], costs: Mapping[str, int], left: int
) -> tuple[dict[str, int], int]:
    """Distribute components among layers in turns, one a turn, as long as the layer has a slot and the budget allows.

    Args:
        order: layer names in the order of their turns.
        free: layer name -> number of free slots.
        costs: layer name -> cost of one component of the layer.
        left: budget that may be spent.

    Returns:
        Layer name -> number of components it gets (for all layers in ``free``), and the budget that remains.
    """
    given = dict.fromkeys(free, 0)
    while order := [name for name in order if given[name] < free[name] and costs[name] <= left]:
        for name in order:
            if costs[name] <= left:
                given[name] += 1
                left -= costs[name]
    return given, left
