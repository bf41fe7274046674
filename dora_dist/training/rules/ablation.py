"""Scores by ablation: the loss without a component minus the loss with it alone (ALoRA, Liu et al., NAACL 2024,
equation 6).

CE is the loss on a fixed batch, M the model with all live components, M\\r the model without component r, and M_r the
model with r alone. The score is ``CE(M\\r) - CE(M_r)``; the paper's ``S(M)`` is the same for all r and is omitted. As
functions of the gates, both losses are taken at corners of one cube. To second order the score is
``-c_r (dL/dc_r at the gates + dL/dc_r at 0)``, up to the constant ``CE(M_0) - CE(M)``: exact for a loss that is
quadratic in the gates, and twice the trapezoid of the integrated gradient between the base and M. Scores are signed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraForCausalLM, DynamicLoraModel
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.training.criterion import Criterion

Losses = Sequence[Callable[[], Tensor]]
"""One function for each row of the fixed batch, returning the row's loss, a scalar. The batch's loss is their sum. The
same on every rank."""


class Ablation(Criterion):
    """Importance measured at an event, on rows that are held back from training.

    Args:
        model: model with the components.
        exact: whether to use :func:`ablation_scores`; otherwise :func:`ablation_gradient_scores`.

    Attributes:
        losses: losses of the held-back rows; assigned once everything that a row's loss needs exists.
    """

    at_events_only = True

    def __init__(self, model: DynamicLoraModel, exact: bool) -> None:
        self.losses: Losses = ()
        self._model = model
        self._layers = list(model.adapted_layers().values())
        self._score = ablation_scores if exact else ablation_gradient_scores
        gates = [layer.gate for layer in self._layers]
        num_components = sum(gate.numel() for gate in gates)
        self.scores = torch.zeros(num_components, dtype=torch.float64, device=gates[0].device)

    def update(self, agreement: Agreement) -> None:
        assert self.losses, "no rows to score by"
        without_logits = self._model.loss_only() if isinstance(self._model, DynamicLoraForCausalLM) else nullcontext()
        with without_logits:
            self.scores = self._score(self._model, self._layers, self.losses, agreement)


@torch.no_grad()
def ablation_scores(
    model: nn.Module, layers: Sequence[DynamicLoraLinear], losses: Losses, agreement: Agreement
) -> Tensor:
    """``CE(M\\r) - CE(M_r)`` for every live component, by running the model without it and with it alone.

    Every score is computed once, by one rank, over the whole batch; ranks therefore cannot disagree about it. The first
    rank prints the expected duration after its first component.

    Args:
        model: model with these components; it computes as in evaluation.
        layers: all adapted layers, the same on every rank.
        losses: losses of the fixed batch's rows.
        agreement: collectives over the ranks.

    Returns:
        Shape ``(components,)``, float64, in the order of ``layers``; 0 for masked components.

    Raises:
        ValueError: a loss is not finite; on all ranks if that is so on all of them.
        RankFailedError: a rank has failed; on all ranks.
    """
    masks = [layer.component_mask.clone() for layer in layers]
    places = [(number, index) for number, mask in enumerate(masks) for index in mask.nonzero().flatten().tolist()]
    starts = torch.tensor([0, *(mask.numel() for mask in masks)]).cumsum(0).tolist()
    scores = torch.zeros(starts[-1], dtype=torch.float64, device=agreement.device)
    mine = places[agreement.rank :: agreement.size]
    with (
        agreement.together("scoring components by ablation"),
        _evaluating(model),
        _masks_restored(layers, masks),
        agreement.uneven_forwards(),
    ):
        began = time.monotonic()
        for done, (number, index) in enumerate(mine):
            layers[number].component_mask[index] = False
            without = _sum(losses)
            for layer in layers:
                layer.component_mask.zero_()
            layers[number].component_mask[index] = True
            alone = _sum(losses)
            for layer, mask in zip(layers, masks, strict=True):
                layer.component_mask.copy_(mask)
            scores[starts[number] + index] = without - alone
            if done == 0 and agreement.is_first:
                seconds = (time.monotonic() - began) * len(mine)
                say(
                    f"scoring {len(places)} components by ablation, {2 * len(places)} forwards of {len(losses)} rows: "
                    f"about {seconds:.0f} s"
                )
    agreement.add_up(scores)
    return scores.to(layers[0].gate.device)


def ablation_gradient_scores(
    model: nn.Module, layers: Sequence[DynamicLoraLinear], losses: Losses, agreement: Agreement
) -> Tensor:
    """``-c_r (dL/dc_r at the gates + dL/dc_r at gates of 0)`` for every live component, by two backward passes.

    The ranks share the batch's rows. No parameter's ``.grad`` is set, and no engine takes part in the passes.

    Args:
        model: model with these components; it computes as in evaluation.
        layers: all adapted layers, the same on every rank.
        losses: losses of the fixed batch's rows.
        agreement: collectives over the ranks.

    Returns:
        Shape ``(components,)``, float64, in the order of ``layers``; 0 for masked components.

    Raises:
        ValueError: a gradient is not finite; on all ranks if that is so on all of them.
        RankFailedError: a rank has failed; on all ranks.
    """
    gates = [layer.gate for layer in layers]
    values = [gate.detach().clone() for gate in gates]
    share, more = losses[agreement.rank :: agreement.size], losses[: agreement.runs_more(len(losses))]
    with (
        agreement.together("scoring components by ablation gradients", runs_model=True),
        _evaluating(model),
        _gates_restored(gates, values),
    ):
        total = _gate_gradients(gates, share)
        _gate_gradients(gates, more)
        for gate in gates:
            gate.data.zero_()
        total += _gate_gradients(gates, share)
        _gate_gradients(gates, more)
    total = total.to(agreement.device)
    agreement.add_up(total)
    return -torch.cat(values).double() * total.to(gates[0].device)


def _sum(losses: Losses) -> float:
    """Sum of the rows' losses, in float64."""
    total = sum(float(loss().double()) for loss in losses)
    if not torch.isfinite(torch.tensor(total)):
        raise ValueError(
            f"the loss of the scoring rows is {total}, so no component can be scored: check these rows and the model's "
            "output on them, or choose another pruning.importance"
        )
    return total


def _gate_gradients(gates: Sequence[nn.Parameter], losses: Losses) -> Tensor:
    """Gradient of the rows' summed loss with respect to all gates, shape ``(components,)``, float64."""
    total = torch.zeros(sum(gate.numel() for gate in gates), dtype=torch.float64, device=gates[0].device)
    for loss in losses:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), gates, allow_unused=True, materialize_grads=True)
        total += torch.cat([gradient.double() for gradient in gradients])
    if not torch.isfinite(total).all():
        raise ValueError(
            "the gradient of the scoring rows' loss is not finite, so no component can be scored: check these rows and "
            "the model's output on them, or choose another pruning.importance"
        )
    return total


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _masks_restored(layers: Sequence[DynamicLoraLinear], masks: Sequence[Tensor]) -> Iterator[None]:
    """Allows changes to the masks, and restores them to ``masks`` at the end."""
    try:
        yield
    finally:
        for layer, mask in zip(layers, masks, strict=True):
            layer.component_mask.copy_(mask)


@contextmanager
def _gates_restored(gates: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Allows changes to the gates and gives them gradients, even if untrained; restores them to ``values`` at the
    end."""
    trained = [gate.requires_grad for gate in gates]
    try:
        for gate in gates:
            gate.requires_grad_(True)
        yield
    finally:
        for gate, value, was_trained in zip(gates, values, trained, strict=True):
            gate.data.copy_(value)
            gate.requires_grad_(was_trained)
