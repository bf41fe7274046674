"""``pruning.rule: prune``: all components are there at the start, and events remove some (Mao et al., ACL 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.config.pruning import Selection
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import Moments, write_entries, zero_entries
from dora_dist.method.budget import Budget
from dora_dist.method.rebasing import singular_components
from dora_dist.training.criterion import Criterion
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.rule import Masks, Rule


class Prune(Rule):
    """The components with the highest scores stay, within the budget of the step.

    Args:
        layers: adapted layers by name; the same names on every rank.
        budget: budget of the layers' components over the run.
        selection: bounds of a layer's rank, regrowth and re-basing; by default no bounds, and regrowth. Where gates are
            not trained, nothing can grow back.

    Raises:
        ValueError: no selection within the bounds spends the final budget.
    """

    regularized = True

    def __init__(
        self, layers: Mapping[str, DynamicLoraLinear], budget: Budget, selection: Selection | None = None
    ) -> None:
        super().__init__(layers, budget)
        self._selection = selection or Selection()
        # A gate that is not trained stays 0: what is pruned is gone, and must not compete for the budget again.
        self._regrow = self._selection.regrow and any(layer.gate.requires_grad for layer in layers.values())
        self.renews = self._selection.rebase
        # Refuse bounds that cannot be met, before the run; every other budget is above the final one.
        if final_step := budget.schedule.final_step:
            anything = {name: torch.zeros(layer.gate.numel()) for name, layer in layers.items()}
            budget.select(anything, final_step, self._selection.min_rank, self._selection.max_rank)

    @torch.no_grad()
    def prepare(self, criterion: Criterion, agreement: Agreement) -> None:
        """With re-basing, replaces the components of every layer by singular ones. All ranks decompose the same
        components, but different processors differ in the last bits, so the mean over the ranks is used."""
        if not self._selection.rebase:
            return
        for layer in self._layers.values():
            kept = layer.component_mask
            parts = layer.lora_a[kept], layer.gate[kept], layer.lora_b[:, kept]
            if not len(parts[1]):
                continue
            flat = agreement.mean(torch.cat([part.flatten() for part in singular_components(*parts)]))
            whole = (layer.lora_a, layer.gate, layer.lora_b)
            masks = (kept.unsqueeze(1).expand_as(layer.lora_a), kept, kept.expand_as(layer.lora_b))
            sizes = [part.numel() for part in parts]
            for parameter, chosen, new in zip(whole, masks, torch.split(flat, sizes), strict=True):
                values = torch.zeros_like(parameter, dtype=torch.float64).masked_scatter_(chosen, new)
                write_entries(parameter, values, chosen)
        criterion.rescore()

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        selection = self._selection
        masks = {name: layer.component_mask for name, layer in self._layers.items()}
        most = selection.max_rank if step == self._budget.schedule.final_step else None
        return self._budget.select(scores, step, selection.min_rank, most, None if self._regrow else masks)

    @torch.no_grad()
    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        for name, layer in self._layers.items():
            keep = chosen[name].to(layer.gate.device)
            zero_entries(layer.gate, keep)
            if step == self._budget.schedule.final_step or not self._regrow:
                set_mask(layer, keep)
