"""Importance criteria during training: scores that are updated after every optimizer step, on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.config.pruning import GATE_SENSITIVITY, LOSS_CHANGE
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.growing import ModuleScores, sensitivity_of_layers
from dora_dist.method.importance import LayerParameters, ScoreFunction, smooth, weight_criterion


class Criterion(ABC):
    """The interface between the controller and a criterion.

    Attributes:
        scores: shape ``(components of the model,)``, float64, higher is more important. Events select by the mean over
            the ranks. Checkpoints keep the scores.
        state: tensors that checkpoints keep in addition; a resumed run fills them in place.
        at_events_only: whether scores are computed only at events, and not after every step.
    """

    scores: Tensor
    at_events_only = False

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {}

    @abstractmethod
    def update(self, agreement: Agreement) -> None:
        """Update the scores on every rank together: after every optimizer step until the final event, or before every
        event with ``at_events_only``. May raise only after its collectives."""

    def rescore(self) -> None:
        """Score again after all components have been replaced.

        Raises:
            ValueError: the criterion cannot score components without their past.
        """
        raise ValueError(
            f"{type(self).__name__} has no score for components that an event has just made: set pruning.rebase to "
            "false, or choose another pruning.importance"
        )

    def after_event(self) -> None:
        """Called after an event has selected by the scores."""
        return

    def forget(self, components: Tensor) -> None:
        """Set the scores of components to 0 that an event has started in slots which others had before.

        Args:
            components: boolean, shape of :attr:`scores`, on any device.
        """
        self.scores.masked_fill_(components.to(self.scores.device), 0)

    def end(self) -> None:
        """Stop observing the training, and drop what that needs: no event follows. Scores and state stay."""
        return


class SmoothedScores(Criterion):
    """Scores of the weights, smoothed over steps (equation 8). No collective: the weights are the same on all ranks.

    Args:
        score: function that scores the weights.
        smoothing: weight of the past, in [0, 1).
        layers: adapted layers, in the order of the scores.
    """

    def __init__(self, score: ScoreFunction, smoothing: float, layers: Iterable[DynamicLoraLinear]) -> None:
        self._score = score
        self._smoothing = smoothing
        self._layers = list(layers)
        gates = [layer.gate for layer in self._layers]
        self.scores = torch.zeros(sum(map(len, gates)), dtype=torch.float64, device=gates[0].device)

    def update(self, agreement: Agreement) -> None:
        self.scores = smooth(self.scores, self._score(parameters_of(self._layers)).flatten(), self._smoothing)

    def rescore(self) -> None:
        self.scores = self._score(parameters_of(self._layers)).flatten().double()


class _GateChanges:
    """``c_i dL/dc_i`` at every step, with ``c_i`` after the optimizer step and the gradient that the step was made of,
    from before it. To first order, and but for what the step changes, setting ``c_i`` to 0 changes the loss by minus
    this value.

    The gradient is that of the task loss over the whole global batch. It is linear: each rank sums over its
    micro-batches, and the mean over the ranks is the same on any number of ranks. Tensor hooks read the gradient before
    an engine shards or clips it. (Under DeepSpeed the optimizer steps inside ``backward``, and no gradient is left
    afterwards.) Each step reduces one flat tensor.

    Args:
        gates: gates of all layers, shape ``(r,)`` each; they must be trained.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        sizes = [gate.numel() for gate in gates]
        self._gates = list(gates)
        self._gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=gates[0].device)
        # The hooks write to views of one flat tensor, which needs no gathering.
        parts = torch.split(self._gradient, sizes)
        self._hooks = [gate.register_hook(_adder(part)) for gate, part in zip(gates, parts, strict=True)]

    def end(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def take(self, agreement: Agreement) -> tuple[Tensor, Tensor]:
        """Values of the step just taken, the same on every rank; then starts anew for the next step. No gradient comes
        to a masked gate, so that its value is 0.

        Returns:
            The values, shape ``(components,)``, float64; and whether all gradients are finite, as a scalar tensor on
            their device, because reading it would make the host wait for the GPU.
        """
        gradient = agreement.mean(self._gradient).double()
        self._gradient.zero_()
        return torch.cat([gate.detach() for gate in self._gates]) * gradient, torch.isfinite(gradient).all()


class GateSensitivity(Criterion):
    """First-order effect of removing a component: ``|c_i dL/dc_i|``, summed over the steps since the last event, with
    ``c_i`` after the optimizer step and the gradient from before it. The absolute value is taken after the mean over
    the global batch. Steps with a non-finite gate gradient do not count.

    Args:
        gates: gates of all layers, shape ``(r,)`` each, in the order of the scores; they must be trained.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        self._changes = _GateChanges(gates)
        self.scores = torch.zeros(sum(map(len, gates)), dtype=torch.float64, device=gates[0].device)

    @torch.no_grad()
    def update(self, agreement: Agreement) -> None:
        change, finite = self._changes.take(agreement)
        self.scores += change.abs().where(finite, 0)

    def after_event(self) -> None:
        self.scores.zero_()

    def end(self) -> None:
        self._changes.end()


class LayerSensitivity(Criterion):
    """IncreLoRA's score of a layer: smoothed sensitivity times smoothed deviation
    (:class:`~dora_dist.method.growing.ModuleScores`), over the global batch. All components of a layer have the layer's
    score. Steps with a non-finite gate gradient do not count.

    Args:
        gates: gates of all layers, shape ``(r,)`` each, in the order of the scores; they must be trained.
    """

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
    def update(self, agreement: Agreement) -> None:
        changes, finite = self._changes.take(agreement)
        before, after = self._averages, self._averages.after(sensitivity_of_layers(changes, self._sizes))
        self._averages = ModuleScores(
            sensitivity=after.sensitivity.where(finite, before.sensitivity),
            uncertainty=after.uncertainty.where(finite, before.uncertainty),
        )
        self.scores = self._averages.scores.repeat_interleave(self._repeats, output_size=len(self.scores))

    def end(self) -> None:
        self._changes.end()


def parameters_of(layers: Iterable[DynamicLoraLinear]) -> list[LayerParameters]:
    """Parameters of layers in the form that scores of weights take: each gate is multiplied by its layer's scale,
    in float64, since both are part of what a component computes; a masked one is 0."""
    layers = list(layers)
    gates = torch.cat([layer.gate.detach() for layer in layers]).double()
    sizes = [layer.gate.numel() for layer in layers]
    gates = gates.where(torch.cat([layer.component_mask for layer in layers]), 0)
    scaled = torch._foreach_mul(gates.split(sizes), [layer.scale for layer in layers])  # one operation for all layers
    return [(layer.lora_a, gate, layer.lora_b) for layer, gate in zip(layers, scaled, strict=True)]


class LossChange(Criterion):
    """How much each component's own movement has lowered the loss so far, to first order (loss change allocation, Lan
    et al., 2019, by component). Every step adds ``-<g, delta>`` over the component's row, column and gate, where g is
    the gradient before the step and delta the step's change of the parameters. The score is negative if the component's
    movement has raised the loss. The sum over all components is the drop of the loss, to first order.

    The gradient is that of the trained loss over the whole global batch (with the equilibrium penalty, if used), before
    an engine clips it. Each rank keeps the sum over its own micro-batches, read by tensor hooks as in
    :class:`GateSensitivity`. ``<g, delta>`` is linear in g and delta is the same on every rank. The mean over the ranks
    of one number per component is therefore that of the global batch. A parameter's value before the step is read in
    its hook, which excludes changes that an event or a resume makes between two steps. Steps with a non-finite product
    do not count.

    Args:
        layers: adapted layers, in the order of the scores; untrained parameters do not move.
    """

    def __init__(self, layers: Sequence[DynamicLoraLinear]) -> None:
        sizes = [layer.gate.numel() for layer in layers]
        self.scores = torch.zeros(sum(sizes), dtype=torch.float64, device=layers[0].gate.device)
        self._effect = torch.zeros_like(self.scores)
        self._moves: list[tuple[Tensor, list[_Move]]] = []
        for layer, part in zip(layers, self._effect.split(sizes), strict=True):
            owned = ((layer.lora_a, 0), (layer.gate, 0), (layer.lora_b, 1))
            self._moves.append((part, [_Move(one, dim) for one, dim in owned if one.requires_grad]))

    @torch.no_grad()
    def update(self, agreement: Agreement) -> None:
        for total, moves in self._moves:
            total.copy_(torch.stack([move.effect() for move in moves]).sum(0))
        effect = agreement.mean(self._effect)
        # Selected on the device: reading the answer would make the host wait for the GPU.
        self.scores -= effect.where(torch.isfinite(effect).all(), 0)

    def end(self) -> None:
        for _, moves in self._moves:
            for move in moves:
                move.end()
        self._moves.clear()


class _Move:
    """One parameter's change over an optimizer step: its value before the step, and the gradient there.

    Args:
        parameter: a trained parameter.
        dim: dimension of its components.
    """

    def __init__(self, parameter: Tensor, dim: int) -> None:
        self._parameter = parameter  # not its data: an engine may replace the storage
        self._before = parameter.detach().clone()
        self._gradient = torch.zeros_like(self._before, dtype=torch.promote_types(parameter.dtype, torch.float32))
        self._others = [other for other in range(parameter.ndim) if other != dim]
        self._hook = parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:  # returns None: a hook's return value would replace the gradient
        self._before.copy_(self._parameter.detach())
        self._gradient.add_(gradient)

    def effect(self) -> Tensor:
        """First-order effect of the step on this rank's loss, for each component: shape ``(r,)``, float64. Then starts
        anew for the next step."""
        change = self._gradient * (self._parameter.to(self._gradient.dtype) - self._before)
        effect = change.sum(self._others, dtype=torch.float64) if self._others else change.double()
        self._gradient.zero_()
        return effect

    def end(self) -> None:
        """Remove the hook."""
        self._hook.remove()


def criterion_of(name: str, layers: Sequence[DynamicLoraLinear], smoothing: float, seed: int) -> Criterion:
    """A new criterion by name.

    Args:
        name: :data:`~dora_dist.config.pruning.GATE_SENSITIVITY`, :data:`~dora_dist.config.pruning.LOSS_CHANGE`, or one
            of :data:`~dora_dist.method.importance.WEIGHT_CRITERIA`.
        layers: adapted layers, in the order of the scores.
        smoothing: weight of the past, for scores of weights.
        seed: seed of random scores.

    Raises:
        ValueError: there is no such criterion.
    """
    if name == GATE_SENSITIVITY:
        return GateSensitivity([layer.gate for layer in layers])
    if name == LOSS_CHANGE:
        return LossChange(layers)
    return SmoothedScores(weight_criterion(name, seed), smoothing, layers)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:  # returns None: a hook's return value would replace the gradient
        total.add_(gradient)

    return add
