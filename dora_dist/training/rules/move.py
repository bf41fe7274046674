"""``pruning.rule: move``: the budget is spent from the start, and events move components between layers (ALoRA, Liu et
al., NAACL 2024).

Every layer has more slots than components. Shapes never change: removing a component masks its slot, and a new
component takes a masked slot.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.engine import Moments, write_entries, zero_entries
from dora_dist.method.budget import Budget
from dora_dist.method.moving import move_components
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.rule import Masks, Rule


class Move(Rule):
    """The components with the lowest scores are removed, and the layers that lost none get their budget; see
    :func:`~dora_dist.method.moving.move_components`.

    Args:
        layers: adapted layers by name, each with its initial live components; the same on every rank.
        budget: budget of the layers' components, constant over the run.
        num_moved: largest number of components that an event moves.
        min_rank: smallest number of components that every layer keeps.
        seed: seed of the new components.
    """

    reuses = True

    def __init__(
        self,
        layers: Mapping[str, DynamicLoraLinear],
        budget: Budget,
        *,
        num_moved: int,
        min_rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, budget)
        self._num_moved = num_moved
        self._min_rank = min_rank
        self._seed = seed

    def is_due(self, step: int) -> bool:
        """Not in the warm-up, even where the schedule's ``t = 0`` lasts two steps, the first of them in it: nothing
        would move, but the criterion would forget what it has summed."""
        return super().is_due(step) and not self._budget.schedule.in_warmup(step)

    def chooses(self, step: int) -> bool:
        return True

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        costs, budget = self._budget.costs, self._budget.at(step)
        move = move_components(scores, kept, costs, budget, self._num_moved, self._min_rank)
        return {name: (mask & ~move.pruned[name]) | move.grown[name] for name, mask in kept.items()}

    @torch.no_grad()
    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        for name, layer in self._layers.items():
            alive = chosen[name].to(layer.gate.device)
            zero_entries(layer.gate, alive)
            start_components(layer, chosen[name] & ~kept[name], self._seed, f"{name}/{step}", moments)
            set_mask(layer, alive)


@torch.no_grad()
def start_components(
    layer: DynamicLoraLinear, new: Tensor, seed: int, name: str, moments: Moments | None, gate: float = 1.0
) -> None:
    """Start new components in masked slots: ``a_i`` as in LoRA, ``b_i = 0``. The layer's output does not change, and
    the optimizer's state in these slots is reset.

    Args:
        layer: adapted layer; the caller sets its mask.
        new: slots of the new components; boolean, shape ``(r,)``.
        seed: seed of ``a_i``.
        name: name of the layer and the event, on which ``a_i`` depends too.
        moments: the optimizer's moments; None where no engine has prepared the model.
        gate: value of ``c_i``.
    """
    if not new.any():
        return
    chosen = new.to(layer.gate.device)
    rows = layer.draw_rows(seed, name).to(layer.gate.device)
    for parameter, values, entries in (
        (layer.lora_a, rows, chosen.unsqueeze(1).expand_as(layer.lora_a)),
        (layer.lora_b, torch.zeros_like(layer.lora_b), chosen.expand_as(layer.lora_b)),
        (layer.gate, torch.full_like(layer.gate, gate), chosen),
    ):
        write_entries(parameter, values, entries)
        if moments is not None:
            moments.zero(parameter, entries)
