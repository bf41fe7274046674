"""Rank growth: layers start with few components and grow up to the budget (Zhang et al., 2023, IncreLoRA).

Pure functions on tensors. At every event, the layers with the highest scores get one component each. The paper's
sensitivity is the mean of ``|DW o dL/dDW|`` over the elements of a layer's matrix, which needs the gradient of that
matrix. Here it is the sum of ``|c_i dL/dc_i|`` over the components, which needs only the gradients of the gates.
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
    """Smoothed sensitivity of every layer, and its smoothed deviation.

    Attributes:
        sensitivity: shape ``(layers,)``, float64: ``I <- beta I + (1 - beta) S``.
        uncertainty: shape ``(layers,)``, float64: ``U <- beta U + (1 - beta) |I - S|``, with the new ``I``.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def start(cls, num_layers: int, device: torch.device | str = "cpu") -> "ModuleScores":
        """All zeros: the state before the first step."""
        zeros = torch.zeros(num_layers, dtype=torch.float64, device=device)
        return cls(sensitivity=zeros, uncertainty=zeros.clone())

    def after(self, sensitivity: Tensor, beta: float = 0.85) -> "ModuleScores":
        """The averages after one more step.

        Args:
            sensitivity: sensitivity ``S`` of the new step, shape ``(layers,)``.
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
    """Sensitivity of each layer: the sum of ``|c_i dL/dc_i|`` over its components.

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
    """Give new components to the layers with the highest scores until the budget is spent.

    Layers take turns in the order of score per cost, ties by name, and get one component a turn. A layer is passed over
    if it has no free slot or if its component does not fit the budget. As in the paper, a budget with room for ``h``
    new components gives one to each of the ``h`` best layers.

    Args:
        scores: layer name -> the layer's score.
        alive: layer name -> boolean mask of shape ``(slots,)``, True where a component is alive.
        costs: layer name -> cost of one component of the layer, at least 1, in the units of the budget.
        budget: largest total cost of the components after the event.

    Returns:
        Layer name -> boolean mask of shape ``(slots,)`` on the CPU, True where a new component starts: always the first
        free slots. The unspent budget is less than the cost of any component that has a free slot.

    Raises:
        ValueError: a score is not finite, or the live components already cost more than the budget.
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
