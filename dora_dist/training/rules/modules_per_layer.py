"""``pruning.rule: modules_per_layer``: one event keeps the best modules of every block, and plans their ranks for later
runs (after FanLoRA, Tian et al., EMNLP 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.console.text import say
from dora_dist.distributed.engine import Moments, zero_entries
from dora_dist.method.budget import Budget
from dora_dist.method.modules import select_modules
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.rule import Masks, Rule


class ModulesPerLayer(Rule):
    """The modules with the highest scores in every block keep all their components; the others lose all. See
    :func:`~dora_dist.method.modules.select_modules`.

    Args:
        layers: adapted layers by name; the same names on every rank.
        budget: budget of the plan's components; it equals the cost of all components of ``layers``.
        per_block: number of modules that stay in every block.
    """

    def __init__(self, layers: Mapping[str, DynamicLoraLinear], budget: Budget, per_block: int) -> None:
        super().__init__(layers, budget)
        self._per_block = per_block

    def chooses(self, step: int) -> bool:
        return True

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        plan = self.plan(step, scores)
        return {name: mask if plan[name] else torch.zeros_like(mask) for name, mask in kept.items()}

    @torch.no_grad()
    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        for name, layer in self._layers.items():
            alive = chosen[name].to(layer.gate.device)
            zero_entries(layer.gate, alive)
            set_mask(layer, alive)
        num_kept = sum(bool(mask.any()) for mask in chosen.values())
        say(
            f"step {step}: {self._per_block} modules of every block stay, {num_kept} of {len(chosen)}; the others have "
            "no adapter from here on. This run's plan.json gives the whole budget to those that stay"
        )

    def plan(self, step: int, scores: Mapping[str, Tensor]) -> Mapping[str, int]:
        """The whole budget distributed over the modules that stay; 0 for the others."""
        budget = self._budget.at(step)
        found = select_modules(scores, self._budget.costs, budget, self._per_block)
        return dict.fromkeys(self._layers, 0) | found
