"""Ranks that are fixed before the first step, at the cost of a uniform adapter. Pure functions."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_dist.method.allocation import select_within_budget
from dora_dist.method.layer_names import split_name

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)

LARGEST_GRADIENT = 2**28
"""Most gradient elements held in memory at once, in float32; only whole layers are held."""


def apportion(
    weights: Mapping[str, float], costs: Mapping[str, int], budget: int, most: Mapping[str, int], least: int = 0
) -> dict[str, int]:
    """Integer ranks in proportion to weights, within a budget.

    Uses the method of odd numbers (Sainte-Lague): a layer's next component has the claim weight / (2 rank + 1), and the
    largest claim gets the next component. Equal weights give equal ranks where the budget is that of a uniform rank.

    Args:
        weights: layer name -> relative amount of rank that the layer should get, at least 0.
        costs: layer name -> cost of one component, at least 1, in the units of the budget.
        budget: largest total cost of all components.
        most: layer name -> the layer's largest rank.
        least: smallest rank of every layer, whatever its weight.

    Returns:
        Layer name -> rank; ``least`` where the weight is 0. The unspent budget is less than the cost of any component
        that could still be added.

    Raises:
        ValueError: the budget is more than the layers can hold, or all weights are 0.
    """
    if not any(weight > 0 for weight in weights.values()):
        raise ValueError("no layer has a weight above 0, so there is nothing to give ranks to")
    chosen = {name: weight for name, weight in weights.items() if weight > 0 or least}
    claims = {
        name: costs[name] * weight / (2 * torch.arange(most[name], dtype=torch.float64) + 1)
        for name, weight in chosen.items()
    }
    kept = select_within_budget(claims, {name: costs[name] for name in chosen}, budget, least)
    return {name: int(kept[name].sum()) if name in kept else 0 for name in weights}


def in_mlps(names: Sequence[str]) -> dict[str, float]:
    """Weights by a layer's name: 1 outside attention blocks, 0 inside.

    Raises:
        ValueError: the names put all layers inside, or all outside.
    """
    weights = {name: 0.0 if ATTENTION.search(name) else 1.0 for name in names}
    if len(set(weights.values())) < 2:
        kind = "outside of" if any(weights.values()) else "in"
        raise ValueError(f"all adapted layers are {kind} attentions by their names, such as {min(names)}")
    return weights


def rising_with_depth(names: Sequence[str]) -> dict[str, float]:
    """Weights that rise linearly with depth, from 1/2 in the first block to 3/2 in the last, separately in each stack
    of blocks (as the ranks of PRILoRA do, EACL 2024 Findings).

    Raises:
        ValueError: a layer is not in a numbered block.
    """
    return {name: 0.5 + (number / last if last else 0.5) for name, (number, last) in _depths(names).items()}


def in_strata(names: Sequence[str]) -> dict[str, float]:
    """Weights by depth in three strata: 0 in the lower third of the blocks, 1/2 in the middle, 1 in the upper third,
    separately in each stack of blocks, as in SPAFIT (2024). If the number of blocks is not divisible by 3, the upper
    strata get more blocks. The paper trains only biases in its middle stratum. That has no counterpart here, so the
    middle stratum gets half of the upper one's rank.

    Raises:
        ValueError: a layer is not in a numbered block.
    """
    strata = (1.0, 0.5, 0.0)
    return {name: strata[3 * (last - number) // (last + 1)] for name, (number, last) in _depths(names).items()}


def _depths(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Layer name -> (number of its block, number of the last block in its stack).

    Raises:
        ValueError: a layer is not in a numbered block.
    """
    places: dict[str, tuple[str, int]] = {}
    for name in names:
        stack, number, _ = split_name(name)
        if number is None:
            raise ValueError(f"{name} is in no numbered block, so it has no depth")
        places[name] = stack, number
    last: dict[str, int] = {}
    for stack, number in places.values():
        last[stack] = max(last.get(stack, 0), number)
    return {name: (number, last[stack]) for name, (stack, number) in places.items()}


def by_spectrum(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks from the gradients' spectra: chooses the components with the largest sum of squared singular values within
    the budget. To first order, among all choices of that many directions of each gradient, a step of fixed length along
    these lowers the loss most.

    Args:
        spectra: layer name -> singular values of its frozen weight's gradient, shape ``(slots,)``, the largest first.
        costs: layer name -> cost of one component.
        budget: largest total cost of all components.

    Returns:
        Layer name -> rank, possibly 0.

    Raises:
        ValueError: a value is not finite, or the budget is more than the slots can hold.
    """
    kept = select_within_budget({name: values.square() for name, values in spectra.items()}, costs, budget)
    return {name: int(mask.sum()) for name, mask in kept.items()}


def by_weight_gradient(
    importance: Mapping[str, float], costs: Mapping[str, int], budget: int, slots: Mapping[str, int], target_rank: int
) -> dict[str, int]:
    """GoRA's ranks (He et al., 2025): in proportion to ``p_m / sqrt(in + out)``, where p_m is layer m's share of the
    total importance, bounded by half and four times the rank of a uniform adapter. The paper's rounding spends the
    budget only approximately; here the factor of proportion is chosen to spend it (:func:`apportion`).

    Args:
        importance: layer name -> mean of ``|W o G|``, at least 0.
        costs: layer name -> cost of one component, its inputs plus outputs.
        budget: largest total cost of all components.
        slots: layer name -> largest number of components the layer has room for.
        target_rank: rank of the uniform adapter.

    Raises:
        ValueError: all importances are 0, or the budget is more than the layers can hold.
    """
    weights = {name: value / costs[name] ** 0.5 for name, value in importance.items()}
    most = {name: min(number, 4 * target_rank) for name, number in slots.items()}
    return apportion(weights, costs, budget, most, target_rank // 2)


def groups_within(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Consecutive names in groups whose sizes sum to at most ``most``. A name larger than that is a group by itself."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
