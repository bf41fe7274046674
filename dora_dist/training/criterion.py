"""How components are judged while training runs: what is collected after every optimizer step, on every rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.config.pruning import GATE_SENSITIVITY, LOSS_CHANGE
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.growing import ModuleScores, sensitivity_of_layers
from dora_dist.method.importance import Components, ScoreFunction, smooth, weight_criterion


class Criterion(Protocol):
    """What the controller asks for scores.

    Attributes:
        scores: shape ``(components of the model,)``, float64, higher is more important; the mean over the ranks is what
            an event selects by. Checkpoints keep it.
        state: what checkpoints keep beside it; filled in place when a run goes on.
        at_events_only: whether the scores are those of a moment, so that steps without an event need none.
    """

    scores: Tensor
    at_events_only: bool

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {}

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


class SmoothedScores(Criterion):
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


class _GateChanges:
    """``c_i dL/dc_i`` of every step: to set ``c_i`` to 0 changes the loss by minus that, to first order.

    The gradient is that of the task loss over the whole global batch: it is linear, so that the mean over the ranks of
    what each has summed over its micro-batches is the same on any number of ranks. It is read by tensor hooks, before
    any engine shards or clips it (under DeepSpeed the optimizer steps inside ``backward``, where no gradient is left).
    One flat tensor is reduced in every step.

    Args:
        gates: of all layers, shape ``(r,)`` each; they must be trained.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        sizes = [gate.numel() for gate in gates]
        self._gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=gates[0].device)
        # The hooks hold views of one flat tensor, so that nothing has to be gathered.
        for gate, part in zip(gates, torch.split(self._gradient, sizes), strict=True):
            gate.register_hook(_adder(part))

    @torch.no_grad()
    def take(self, layers: Sequence[Components], agreement: Agreement) -> tuple[Tensor, Tensor]:
        """Of the step just taken, the same on every rank; the next one begins anew.

        Returns:
            Shape ``(components,)``, float64; and whether all gradients are finite, a scalar where they are: the host of
            a GPU would wait for an answer.
        """
        gradient = agreement.mean(self._gradient).double()
        self._gradient.zero_()
        return torch.cat([gate for _, gate, _ in layers]) * gradient, torch.isfinite(gradient).all()


class GateSensitivity(Criterion):
    """First-order effect of removing a component: ``|c_i dL/dc_i|``, summed over the steps since the last event. The
    absolute value is that of the global batch. Steps in which a gate's gradient is not finite do not count.

    Args:
        gates: of all layers, shape ``(r,)`` each, in the order of the scores; they must be trained.
    """

    at_events_only = False

    def __init__(self, gates: Sequence[Tensor]) -> None:
        self._changes = _GateChanges(gates)
        self.scores = torch.zeros(sum(map(len, gates)), dtype=torch.float64, device=gates[0].device)

    @torch.no_grad()
    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        change, finite = self._changes.take(layers, agreement)
        self.scores += change.abs().where(finite, 0)

    def rescore(self, layers: Sequence[Components]) -> None:
        raise _cannot_rescore(GATE_SENSITIVITY)

    def after_event(self) -> None:
        self.scores.zero_()


class LayerSensitivity(Criterion):
    """How much a layer matters, and how unsure this is: IncreLoRA's smoothed sensitivity times its smoothed deviation
    (:class:`~dora_dist.method.growing.ModuleScores`), over the global batch. The score of a layer stands at each of its
    components. Steps in which a gate's gradient is not finite do not count.

    Args:
        gates: of all layers, shape ``(r,)`` each, in the order of the scores; they must be trained.
    """

    at_events_only = False

    def __init__(self, gates: Sequence[Tensor]) -> None:
        self._changes = _GateChanges(gates)
        self._sizes = [len(gate) for gate in gates]
        device = gates[0].device
        self._averages = ModuleScores.start(len(gates), device)
        self._repeats = torch.tensor(self._sizes, device=device)
        self.scores = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"sensitivity": self._averages.sensitivity, "uncertainty": self._averages.uncertainty}

    @torch.no_grad()
    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        changes, finite = self._changes.take(layers, agreement)
        before, after = self._averages, self._averages.after(sensitivity_of_layers(changes, self._sizes))
        self._averages = ModuleScores(
            sensitivity=after.sensitivity.where(finite, before.sensitivity),
            uncertainty=after.uncertainty.where(finite, before.uncertainty),
        )
        self.scores = self._averages.scores.repeat_interleave(self._repeats, output_size=len(self.scores))

    def rescore(self, layers: Sequence[Components]) -> None:
        raise _cannot_rescore("that of the layers")

    def after_event(self) -> None:
        pass


def components_of(layers: Iterable[DynamicLoraLinear]) -> list[Components]:
    """The components of layers as criteria look at them, with those that a mask leaves out at gate 0."""
    layers = list(layers)
    gates = torch.cat([layer.gate.detach() for layer in layers])
    sizes = [layer.gate.numel() for layer in layers]
    gates = gates.where(torch.cat([layer.component_mask for layer in layers]), 0)
    return [(layer.lora_a, gate, layer.lora_b) for layer, gate in zip(layers, gates.split(sizes), strict=True)]


class LossChange(Criterion):
    """How much each component's own movement has lowered the loss, to first order, over the run so far (loss change
    allocation, Lan et al., 2019, by component): in every step ``-<g, delta>`` over its row, column and gate, where g is
    the gradient before the step and delta what the step has made of the parameters. Signed: below 0 is a component
    whose movement has raised the loss. The sum over all components is the drop of the loss, to first order.

    The gradient is that of the loss that is trained, over the whole global batch (with the equilibrium penalty, where
    there is one), before an engine clips it. Each rank keeps what its own micro-batches have added up, read by tensor
    hooks as :class:`GateSensitivity` does. ``<g, delta>`` is linear in g, and delta is the same on every rank, so that
    the mean over the ranks of one number a component is that of the global batch. A parameter's values before the step
    are taken in its hook: what an event or a resume changes between two steps is no step's doing. Steps in which a
    product is not finite do not count.

    Args:
        layers: parameters of all layers, in the order of the scores; those that are not trained do not move.
    """

    at_events_only = False

    def __init__(self, layers: Sequence[Components]) -> None:
        sizes = [gate.numel() for _, gate, _ in layers]
        self.scores = torch.zeros(sum(sizes), dtype=torch.float64, device=layers[0][1].device)
        self._effect = torch.zeros_like(self.scores)
        self._moves = []
        for (lora_a, gate, lora_b), part in zip(layers, self._effect.split(sizes), strict=True):
            owned = ((lora_a, 0), (gate, 0), (lora_b, 1))
            self._moves.append((part, [_Move(one, dim) for one, dim in owned if one.requires_grad]))

    @torch.no_grad()
    def update(self, layers: Sequence[Components], agreement: Agreement) -> None:
        for total, moves in self._moves:
            total.copy_(torch.stack([move.effect() for move in moves]).sum(0))
        effect = agreement.mean(self._effect)
        # Chosen where the products are: the host of a GPU would wait for an answer.
        self.scores -= effect.where(torch.isfinite(effect).all(), 0)

    def rescore(self, layers: Sequence[Components]) -> None:
        raise _cannot_rescore(LOSS_CHANGE)

    def after_event(self) -> None:
        pass


class _Move:
    """A parameter over one optimizer step: its values before it, and the gradient there.

    Args:
        parameter: that is trained.
        dim: along which its components lie.
    """

    def __init__(self, parameter: Tensor, dim: int) -> None:
        self._parameter = parameter  # an engine may give it another storage
        self._before = parameter.detach().clone()
        self._gradient = torch.zeros_like(self._before, dtype=torch.promote_types(parameter.dtype, torch.float32))
        self._others = [other for other in range(parameter.ndim) if other != dim]
        parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:  # what a hook returns would replace the gradient
        self._before.copy_(self._parameter.detach())
        self._gradient.add_(gradient)

    def effect(self) -> Tensor:
        """What the step has done to this rank's loss by each component, to first order: shape ``(r,)``, float64. The
        next step begins anew."""
        change = self._gradient * (self._parameter.to(self._gradient.dtype) - self._before)
        effect = change.sum(self._others, dtype=torch.float64) if self._others else change.double()
        self._gradient.zero_()
        return effect


def criterion_of(name: str, layers: Sequence[Components], smoothing: float, seed: int) -> Criterion:
    """The criterion of a name, at its start.

    Args:
        name: :data:`~dora_dist.config.pruning.GATE_SENSITIVITY`, :data:`~dora_dist.config.pruning.LOSS_CHANGE`, or one
            of :data:`~dora_dist.method.importance.WEIGHT_CRITERIA`.
        layers: parameters of all layers, in the order of the scores.
        smoothing: of scores of weights.
        seed: of the random ones.

    Raises:
        ValueError: there is no such criterion.
    """
    gates = [gate for _, gate, _ in layers]
    if name == GATE_SENSITIVITY:
        return GateSensitivity(gates)
    if name == LOSS_CHANGE:
        return LossChange(layers)
    num_components = sum(gate.numel() for gate in gates)
    return SmoothedScores(weight_criterion(name, seed), smoothing, num_components, gates[0].device)


def _cannot_rescore(name: str) -> ValueError:
    return ValueError(
        f"importance is {name}, which is summed over steps, so that components that an event makes have none: set "
        "rebase to false, or choose another importance"
    )


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:  # what a hook returns would replace the gradient
        total.add_(gradient)

    return add
