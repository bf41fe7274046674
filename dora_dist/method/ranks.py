"""Ranks that are fixed before the first step, at the price of a uniform one. Pure functions."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_dist.method.allocation import select_within_budget

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


LARGEST_GRADIENT = 2**28
"""Elements of the gradients that are in memory at once, in float32: those of whole layers."""


def apportion(
    weights: Mapping[str, float], costs: Mapping[str, int], budget: int, most: Mapping[str, int], least: int = 0
) -> dict[str, int]:
    """Whole ranks in proportion to weights, for as much of a budget as whole components can spend.

    By the method of odd numbers (Sainte-Lague): a layer's next component has the claim weight / (2 rank + 1), and goes
    to the largest claim. Equal weights give equal ranks where the budget is that of a uniform rank.

    Args:
        weights: layer name -> how much rank it is to have in comparison with the others, at least 0.
        costs: layer name -> cost of one component, at least 1, in the units of the budget.
        budget: what all components may cost together.
        most: layer name -> the largest rank that it can have.
        least: rank that every layer has at least, whatever its weight.

    Returns:
        Layer name -> rank, the least one where the weight is 0. What is left of the budget is less than the cost of any
        component that could be added.

    Raises:
        ValueError: the budget is more than the layers can hold, or the weights give nothing.
    """
    if not any(weight > 0 for weight in weights.values()):
        raise ValueError("no layer has a weight above 0, so that there is nothing to give ranks to")
    chosen = {name: weight for name, weight in weights.items() if weight > 0 or least}
    claims = {
        name: costs[name] * weight / (2 * torch.arange(most[name], dtype=torch.float64) + 1)
        for name, weight in chosen.items()
    }
    kept = select_within_budget(claims, {name: costs[name] for name in chosen}, budget, least)
    return {name: int(kept[name].sum()) if name in kept else 0 for name in weights}


def in_mlps(names: Sequence[str]) -> dict[str, float]:
    """Weights of the layers outside of attentions, by their names: 1, and 0 for those of an attention.

    Raises:
        ValueError: all layers are of one kind by their names.
    """
    weights = {name: 0.0 if ATTENTION.search(name) else 1.0 for name in names}
    if len(set(weights.values())) < 2:
        kind = "outside of" if any(weights.values()) else "in"
        raise ValueError(f"all adapted layers are {kind} attentions by their names, such as {min(names)}")
    return weights


def rising_with_depth(names: Sequence[str]) -> dict[str, float]:
    """Weights that rise along a straight line from 1/2 in the first block to 3/2 in the last one (PRILoRA, EACL 2024
    Findings, has ranks that rise so), in each stack of blocks on its own.

    Raises:
        ValueError: a layer is in no numbered block.
    """
    return {name: 0.5 + (number / last if last else 0.5) for name, (number, last) in _depths(names).items()}


def in_strata(names: Sequence[str]) -> dict[str, float]:
    """Weights by depth in three strata: 0 in the lower third of the blocks, 1/2 in the middle one, 1 in the upper one,
    in each stack of blocks on its own, as in SPAFIT (2024). Of a number of blocks that has no thirds, the upper ones
    get more. The paper trains only biases in its middle stratum, which has no counterpart here: this one has half of
    the upper one's rank.

    Raises:
        ValueError: a layer is in no numbered block.
    """
    strata = (1.0, 0.5, 0.0)
    return {name: strata[3 * (last - number) // (last + 1)] for name, (number, last) in _depths(names).items()}


def _depths(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Layer name -> number of its block, and of the last block of its stack.

    Raises:
        ValueError: a layer is in no numbered block.
    """
    places: dict[str, tuple[str, int]] = {}
    for name in names:
        found = NUMBER.search(name)
        if found is None:
            raise ValueError(f"{name} is in no numbered block, so that it has no depth")
        places[name] = name[: found.start()], int(found[1])
    last: dict[str, int] = {}
    for stack, number in places.values():
        last[stack] = max(last.get(stack, 0), number)
    return {name: (number, last[stack]) for name, (stack, number) in places.items()}


def by_spectrum(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks by the spectra of the gradients of the frozen weights: the components for which the sum of squared
    singular values is largest for what they cost. To first order, a step of a fixed length along so many directions of
    each gradient, chosen in this way, lowers the loss most.

    Args:
        spectra: layer name -> singular values, shape ``(slots,)``, the largest first.
        costs: layer name -> cost of one component.
        budget: what all components may cost together.

    Returns:
        Layer name -> rank, 0 for some perhaps.

    Raises:
        ValueError: a value is not finite, or the budget is more than the slots can hold.
    """
    kept = select_within_budget({name: values.square() for name, values in spectra.items()}, costs, budget)
    return {name: int(mask.sum()) for name, mask in kept.items()}


def by_weight_gradient(
    importance: Mapping[str, float], costs: Mapping[str, int], budget: int, slots: Mapping[str, int], target_rank: int
) -> dict[str, int]:
    """GoRA's ranks (He et al., 2025): in proportion to ``p_m / sqrt(in + out)``, where p_m is the share of layer m in
    the importance of all, within a half and four times the rank of a uniform adapter. Its rounding lets the parameters
    come near to the budget; here the factor of proportion is the one for which they meet it (:func:`apportion`).

    Args:
        importance: layer name -> mean of ``|W o G|``, at least 0.
        costs: layer name -> cost of one component, its inputs and outputs.
        budget: what all components may cost together.
        slots: layer name -> the most components that it has room for.
        target_rank: of the uniform adapter.

    Raises:
        ValueError: nothing has an importance, or the budget is more than the layers can hold.
    """
    weights = {name: value / costs[name] ** 0.5 for name, value in importance.items()}
    most = {name: min(number, 4 * target_rank) for name, number in slots.items()}
    return apportion(weights, costs, budget, most, target_rank // 2)


def groups_within(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names that follow each other, in groups whose sizes add up to no more than ``most``, or of one."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
