"""Ranks that grow from one to the budget, layer by layer (Zhang et al., 2023, IncreLoRA).

Pure functions on tensors. The layers with the highest scores get a component at every event. The paper's sensitivity
is the mean of ``|DW o dL/dDW|`` over the elements of a layer's matrix, which needs the gradient of that matrix; here it
is the sum over the components of ``|c_i dL/dc_i|``, which the gates' gradients say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_dist.method.importance import smooth
from dora_dist.method.moving import first_free, in_turns


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleScores:
    """Smoothed sensitivity of every layer, and how much it varies.

    Attributes:
        sensitivity: shape ``(layers,)``, float64: ``I <- beta I + (1 - beta) S``.
        uncertainty: shape ``(layers,)``, float64: ``U <- beta U + (1 - beta) |I - S|``, with the new ``I``.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def start(cls, num_layers: int, device: torch.device | str = "cpu") -> "ModuleScores":
        """Zeros, before the first step."""
        zeros = torch.zeros(num_layers, dtype=torch.float64, device=device)
        return cls(sensitivity=zeros, uncertainty=zeros.clone())

    def after(self, sensitivity: Tensor, beta: float = 0.85) -> "ModuleScores":
        """With one more step.

        Args:
            sensitivity: of this step, ``S``, shape ``(layers,)``.
            beta: weight of the past in both averages, in [0, 1).

        Raises:
            ValueError: ``beta`` is outside [0, 1) or the shapes differ.
        """
        smoothed = smooth(self.sensitivity, sensitivity.double(), beta)
        return ModuleScores(
            sensitivity=smoothed,
            uncertainty=smooth(self.uncertainty, (smoothed - sensitivity.double()).abs(), beta),
        )

    @property
    def scores(self) -> Tensor:
        """``I U``, shape ``(layers,)``, float64; higher is more important."""
        return self.sensitivity * self.uncertainty


def sensitivity_of_layers(changes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum over the components of every layer of ``|c_i dL/dc_i|``.

    Args:
        changes: ``c_i dL/dc_i`` of all components, shape ``(components,)``.
        sizes: number of components of every layer.

    Returns:
        Shape ``(layers,)``, float64.
    """
    return torch.stack([part.abs().sum() for part in changes.double().split(list(sizes))])


def grow_components(
    scores: Mapping[str, float], alive: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, Tensor]:
    """Give new components to the best layers until the budget is spent.

    Layers take turns in the order of score per cost, ties by name, and get one component a turn; one without a free
    slot, or whose component the budget does not pay for, is passed by. A budget that pays for ``h`` components more
    than there are so goes to the ``h`` best layers, as in the paper.

    Args:
        scores: layer name -> score of the layer.
        alive: layer name -> boolean mask of shape ``(slots,)``, True where there is a component.
        costs: layer name -> cost of one component of it, at least 1, in the units of the budget.
        budget: what the components may cost together after the event.

    Returns:
        Layer name -> boolean mask of shape ``(slots,)`` on the CPU, True where a new component starts, in the first
        free slots. What is left of the budget is less than the cost of any component for which there is a slot.

    Raises:
        ValueError: a score is not finite, or what is alive costs more than the budget.
    """
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"layer {name} has a non-finite score: {score}")
    alive = {name: alive[name].cpu() for name in sorted(scores)}
    left = budget - sum(costs[name] * int(mask.sum()) for name, mask in alive.items())
    if left < 0:
        raise ValueError(f"the components cost {budget - left}, more than the budget {budget} that they grow to")
    free = {name: int((~mask).sum()) for name, mask in alive.items()}
    order = sorted(alive, key=lambda name: (-scores[name] / costs[name], name))
    given, _ = in_turns(order, free, costs, left)
    return {name: first_free(mask, given[name]) for name, mask in alive.items()}
