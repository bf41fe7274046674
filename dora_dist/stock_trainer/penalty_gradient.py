"""The penalty in a loop that computes its own loss: the penalty's gradient is added to the loss's gradient."""

from functools import partial

import torch
from torch import Tensor

from dora_dist.training.controller import DynamicRankController


class PenaltyGradient:
    """Adds ``weight`` times the gradient of the Dimensional Equilibrium Modulator, once in every optimizer step.

    Tensor hooks add it where a parameter gets its first gradient of a step, before an engine reduces or clips. It thus
    enters once, whatever the number of micro-batches. All ranks add the same, so the mean over the ranks leaves it
    unchanged.

    Args:
        controller: the controller whose layers are regularized, until its penalty is None.
        weight: weight of the penalty in the loss.
    """

    def __init__(self, controller: DynamicRankController, weight: float) -> None:
        self._controller = controller
        self._weight = weight
        self._parameters = [part for layer in controller.layers.values() for part in (layer.lora_a, layer.lora_b)]
        self._due: dict[int, Tensor] = {}
        self._hooks = [part.register_hook(partial(self._add, at)) for at, part in enumerate(self._parameters)]

    def begin_step(self) -> None:
        """Must be called before the first forward of every optimizer step."""
        self._due = {}  # because torch calls the hooks for the next line too
        penalty = self._controller.penalty()
        if penalty is None:
            self.end()
        else:
            weight = torch.full_like(penalty, self._weight)
            self._due = dict(enumerate(torch.autograd.grad(penalty, self._parameters, weight)))

    def end(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, at: int, gradient: Tensor) -> Tensor | None:
        due = self._due.pop(at, None)
        return None if due is None else gradient + due
