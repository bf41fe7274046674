"""``pruning.rule: grow``: layers start with few components, and each event gives more to the best layers, up to the
budget (Zhang et al., 2023, IncreLoRA).

Every layer has more slots than components. The next free slot holds a reserve: a component whose gate stays at
:data:`RESERVE_GATE`. Its row and column thus train before the component counts (the paper's advance learning).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.engine import Moments, write_entries, zero_entries
from dora_dist.method.budget import Budget
from dora_dist.method.growing import grow_components
from dora_dist.method.moving import first_free
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.rule import Masks, Rule

RESERVE_GATE = 1e-5
"""``c_i`` of a reserve (the paper's lambda). Once the component is granted, its gate grows from this value."""


class Grow(Rule):
    """The layers with the highest scores get one component each, within the budget of the step; see
    :func:`~dora_dist.method.growing.grow_components`.

    A granted component keeps its vectors, its gate and its optimizer state, and the function does not change. From then
    on its gate trains too. For ``warmup`` steps, its learning rate rises from ``1 / warmup`` of the run's to all of it.
    A new reserve takes the next slot; its ``a_i`` and ``b_i`` are those of the start. After the final event there is no
    reserve. Removing the last one takes ``c_i b_i (a_i . x)``, with ``c_i = 1e-5``, out of the function.

    Args:
        layers: adapted layers by name, each with its initial live components; the same on every rank.
        budget: budget of the layers' components, which rises over the run.
        warmup: number of optimizer steps until a new component learns at the run's rate, at least 1.
    """

    def __init__(self, layers: Mapping[str, DynamicLoraLinear], budget: Budget, warmup: int) -> None:
        super().__init__(layers, budget)
        self._warmup = warmup
        sizes = [len(layer.gate) for layer in self._layers.values()]
        # The step after which each component was granted. Initial components learn at the run's rate from step 1.
        self._granted = torch.full((sum(sizes),), -warmup)
        self._granted_of = dict(zip(self._layers, self._granted.split(sizes), strict=True))

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"granted": self._granted}

    def begin(self, kept: Masks) -> None:
        for name, layer in self._layers.items():
            _let_live(layer, kept[name], _reserve(kept[name]))

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        """``scores`` repeat the layer's score at each of its components."""
        first = torch.stack([scores[name][0] for name in self._layers]).tolist()
        of_layers = dict(zip(self._layers, first, strict=True))
        grown = grow_components(of_layers, kept, self._budget.costs, self._budget.at(step))
        return {name: mask | grown[name] for name, mask in kept.items()}

    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        for name, layer in self._layers.items():
            self._granted_of[name][chosen[name] & ~kept[name]] = step
            final = step == self._budget.schedule.final_step
            _let_live(layer, chosen[name], torch.zeros_like(chosen[name]) if final else _reserve(chosen[name]))

    def rates(self, step: int, kept: Masks) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The gate of a reserve has rate 0, whatever the optimizer does with it."""
        if step >= self._budget.schedule.final_step + self._warmup:
            return  # by now, all components learn at the run's rate
        for name, layer in self._layers.items():
            share = ((step - self._granted_of[name]) / self._warmup).clamp(max=1)
            of_gate = share
            if step <= self._budget.schedule.final_step:
                of_gate = share.masked_fill(_reserve(kept[name]), 0)
            if (share < 1).any():
                yield layer.lora_a, share.unsqueeze(1)
                yield layer.lora_b, share
            if (of_gate < 1).any():
                yield layer.gate, of_gate


def _reserve(kept: Tensor) -> Tensor:
    """Boolean mask of the layer's reserve slot, shape ``(slots,)``; all False where every slot has a component."""
    return first_free(kept, 1)


@torch.no_grad()
def _let_live(layer: DynamicLoraLinear, kept: Tensor, reserve: Tensor) -> None:
    """Unmask these components and mask all others. A component that was masked starts with the gate of a reserve."""
    alive = (kept | reserve).to(layer.gate.device)
    new = alive & ~layer.component_mask
    zero_entries(layer.gate, alive)
    write_entries(layer.gate, torch.full_like(layer.gate, RESERVE_GATE), new)
    set_mask(layer, alive)
