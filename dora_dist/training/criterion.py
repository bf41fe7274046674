"""How components are judged while training runs: what is collected after every optimizer step, on every rank."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.config.pruning import GATE_SENSITIVITY
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.importance import Components, ScoreFunction, smooth, weight_criterion


class Criterion(Protocol):
    """What the controller asks for scores.

    Attributes:
        scores: shape ``(components of the model,)``, float64, higher is more important; the mean over the ranks is what
            an event selects by. All of the criterion's state, which checkpoints keep.
        at_events_only: whether the scores are those of a moment, so that steps without an event need none.
    """

    @property
    def scores(self) -> Tensor: ...

    @property
    def at_events_only(self) -> bool: ...

    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        """Look at the components once after every optimizer step until the final event, or before every event, on every
        rank together. May raise after its collectives only."""

    def rescore(self, layers: Sequence[Components]) -> None:
        """Other components have taken the places of those scored so far.

        Raises:
            ValueError: of new components it cannot know anything.
        """

    def after_event(self) -> None:
        """An event has selected by the scores."""


class SmoothedScores:
    """Scores of the weights, smoothed over steps (equation 8). No collective: the weights are the same on all ranks.

    Args:
        score: of the weights.
        smoothing: weight of the past, in [0, 1).
        num_components: of the model.
        device: where the components are.
    """

    at_events_only = False

    def __init__(self, score: ScoreFunction, smoothing: float, num_components: int, device: torch.device) -> None:
        self.scores = torch.zeros(num_components, dtype=torch.float64, device=device)
        self._score = score
        self._smoothing = smoothing

    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        self.scores = smooth(self.scores, self._score(layers).flatten(), self._smoothing)

    def rescore(self, layers: Sequence[Components]) -> None:
        self.scores = self._score(layers).flatten().double()

    def after_event(self) -> None:
        pass


class GateSensitivity:
    """First-order effect of removing a component: ``|c_i dL/dc_i|``, summed over the steps since the last event.

    To set ``c_i`` to 0 changes the loss by ``-c_i dL/dc_i`` to first order. The gradient is that of the task loss over
    the whole global batch: it is linear, so that the mean over the ranks of what each has summed over its micro-batches
    is the same on any number of ranks; the absolute value is taken after that. It is read by tensor hooks, before any
    engine shards or clips it (under DeepSpeed the optimizer steps inside ``backward``, where no gradient is left). One
    flat tensor is reduced in every step. Steps in which a gate's gradient is not finite do not count.

    Args:
        gates: of all layers, shape ``(r,)`` each, in the order of the scores; they must be trained.
    """

    at_events_only = False

    def __init__(self, gates: Sequence[nn.Parameter]) -> None:
        sizes = [gate.numel() for gate in gates]
        self.scores = torch.zeros(sum(sizes), dtype=torch.float64, device=gates[0].device)
        self._gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=gates[0].device)
        # The hooks hold views of one flat tensor, so that nothing has to be gathered.
        for gate, part in zip(gates, torch.split(self._gradient, sizes), strict=True):
            gate.register_hook(_adder(part))

    @torch.no_grad()
    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        gradient = agreement.mean(self._gradient).double()
        self._gradient.zero_()
        change = (torch.cat([gate for _, gate, _ in layers]) * gradient).abs()
        # Chosen where the gradient is: the host of a GPU would wait for an answer.
        self.scores += change.where(torch.isfinite(gradient).all(), 0)

    def rescore(self, layers: Sequence[Components]) -> None:
        raise ValueError(
            f"importance is {GATE_SENSITIVITY}, which is summed over steps, so that components that an event makes "
            "have none: set rebase to false, or choose another importance"
        )

    def after_event(self) -> None:
        self.scores.zero_()


def components_of(layers: Iterable[DynamicLoraLinear]) -> list[Components]:
    """The components of layers as criteria look at them, with those that a mask leaves out at gate 0."""
    layers = list(layers)
    gates = torch.cat([layer.gate.detach() for layer in layers])
    sizes = [layer.gate.numel() for layer in layers]
    gates = gates.where(torch.cat([layer.component_mask for layer in layers]), 0)
    return [(layer.lora_a, gate, layer.lora_b) for layer, gate in zip(layers, gates.split(sizes), strict=True)]


def criterion_of(name: str, gates: Sequence[nn.Parameter], smoothing: float, seed: int) -> Criterion:
    """The criterion of a name, at its start.

    Args:
        name: :data:`~dora_dist.config.pruning.GATE_SENSITIVITY`, or one of
            :data:`~dora_dist.method.importance.WEIGHT_CRITERIA`.
        gates: of all layers, shape ``(r,)`` each, in the order of the scores.
        smoothing: of scores of weights.
        seed: of the random ones.

    Raises:
        ValueError: there is no such criterion.
    """
    if name == GATE_SENSITIVITY:
        return GateSensitivity(gates)
    num_components = sum(gate.numel() for gate in gates)
    return SmoothedScores(weight_criterion(name, seed), smoothing, num_components, gates[0].device)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:  # what a hook returns would replace the gradient
        total.add_(gradient)

    return add
