"""``pruning.rule: move``: the budget is met from the start, and events move components between layers (ALoRA, Liu et
al., NAACL 2024).

Every layer has slots, more than it has components. Shapes never change: a component that goes leaves a slot that is
masked, and a new one takes such a slot.
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
    """The lowest components go, and the layers that lost none get their budget; see
    :func:`~dora_dist.method.moving.move_components`.

    Args:
        layers: Adapted layers by name, with the components alive that the run starts with; the same on every rank.
        budget: What their components may cost, which does not change over the run.
        num_moved: Components that an event moves, at most.
        min_rank: Components that every layer keeps at least.
        seed: Of the new components.
    """

    regularized = False
    renews = False

    def __init__(
        self,
        layers: Mapping[str, DynamicLoraLinear],
        budget: Budget,
        *,
        num_moved: int,
        min_rank: int = 0,
        seed: int = 0,
    ) -> None:
        self._layers = dict(sorted(layers.items()))
        self._budget = budget
        self._num_moved = num_moved
        self._min_rank = min_rank
        self._seed = seed

    def chooses(self, step: int, budget: Budget) -> bool:
        return not budget.schedule.in_warmup(step)

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        if self._budget.schedule.in_warmup(step):
            return kept
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
    """Let new components start in slots that are masked: ``a_i`` as LoRA's, ``b_i = 0``. The layer's output stays what
    it is, and the optimizer knows nothing of what had been there.

    Args:
        layer: whose mask is left to the caller.
        new: boolean, shape ``(r,)``; the slots.
        seed: of ``a_i``.
        name: of the layer and the event, on which ``a_i`` depends too.
        moments: of the optimizer; None where no engine has prepared the model.
        gate: ``c_i``.
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
