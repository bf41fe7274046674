"""Selects whole modules in every block by the scores of their components, as in FanLoRA (Tian et al., EMNLP 2024).

The paper's own score was not available to us; any criterion can be used instead.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_dist.method.layer_names import split_name


def select_modules(
    scores: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, per_block: int
) -> dict[str, int]:
    """Keep the best modules of every block, and spend the whole budget on them.

    A module is an adapted layer; its score is the sum of its components' scores. All kept modules get the same rank,
    the largest that the budget allows. What remains buys one more component each for the modules with the highest
    scores, in that order. Ties are broken by name.

    Args:
        scores: layer name -> scores, shape ``(r,)``, any floating dtype; summed in float64 on the CPU.
        costs: layer name -> cost of one component of the layer, at least 1, in the units of the budget.
        budget: largest total cost of the planned components.
        per_block: number of modules kept in every block (:func:`~dora_dist.method.layer_names.split_name`).

    Returns:
        Layer name -> rank, for the kept modules only. Their cost is at most the budget; less than the cost of the most
        expensive kept module's component is unspent.

    Raises:
        ValueError: a score is not finite, a block has fewer modules than ``per_block``, or the budget does not allow
            one component of every kept module.
    """
    totals = {name: float(values.detach().double().cpu().sum()) for name, values in sorted(scores.items())}
    blocks: dict[str, list[str]] = {}
    for name, total in totals.items():
        if not torch.isfinite(torch.tensor(total)):
            raise ValueError(f"layer {name} has a non-finite score: {scores[name].tolist()}")
        blocks.setdefault(split_name(name).block, []).append(name)
    kept: list[str] = []
    for block, names in blocks.items():
        if not 1 <= per_block <= len(names):
            raise ValueError(
                f"pruning.modules_per_layer is {per_block}, but must be 1 to {len(names)}, the number of adapted "
                f"modules of {block or 'the model'}: {', '.join(names)}"
            )
        kept += sorted(names, key=lambda name: (-totals[name], name))[:per_block]
    together = sum(costs[name] for name in kept)
    if budget < together:
        raise ValueError(
            f"a budget of {budget} does not pay for one component of each of {len(kept)} modules, which cost "
            f"{together}: raise adapter.target_rank or lower pruning.modules_per_layer"
        )
    plan = dict.fromkeys(sorted(kept), budget // together)
    left = budget % together
    for name in sorted(kept, key=lambda name: (-totals[name], name)):
        if costs[name] <= left:
            plan[name] += 1
            left -= costs[name]
    return plan


def highest_rank(costs: Mapping[str, int], budget: int, per_block: int) -> int:
    """The highest rank that :func:`select_modules` can give a module: the rank when the cheapest modules are kept.

    Raises:
        ValueError: :func:`select_modules` would raise with any scores.
    """
    cheapest = {name: torch.tensor([-float(cost)]) for name, cost in costs.items()}
    return max(select_modules(cheapest, costs, budget, per_block).values())
