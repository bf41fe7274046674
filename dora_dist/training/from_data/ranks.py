"""Chooses ranks from training rows before the first step, by the gradients of the frozen weights.

``gradient_spectrum`` uses the leading singular values of every layer's gradient. They are found like the directions of
``adapter.init: gradient``, without building the matrix. ``weight_gradient`` is GoRA's measure (2025), the mean of
``|W o G|`` over a layer's elements. An absolute value is not linear in the tokens, so the layer's whole gradient is
first summed over all rows and ranks. One pass handles as many layers as
:data:`~dora_dist.method.ranks.LARGEST_GRADIENT` allows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.quantization import dequantized_weight
from dora_dist.config.adapter import GRADIENT_SPECTRUM
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import Budget
from dora_dist.method.ranks import by_spectrum, by_weight_gradient
from dora_dist.training.from_data.passes import (
    PASSES,
    Add,
    Columns,
    Rows,
    add_up_rows,
    as_in_training,
    draw_probes,
    next_probes,
    products_of,
    tokens_of,
)


@dataclass(frozen=True, kw_only=True)
class RankChoice:
    """How a run's ranks are chosen from data.

    Attributes:
        ranks: ``gradient_spectrum`` or ``weight_gradient``.
        rows: indices of the training rows.
        seed: seed of the probes and of randomness in the base.
        target_rank: rank of a uniform adapter with the same budget.
        groups: layers handled together in each pass; for ``weight_gradient``.
    """

    ranks: str
    rows: Sequence[int]
    seed: int
    target_rank: int
    groups: Sequence[Sequence[str]]

    of_gradient = True  # both measures need gradients

    @property
    def num_passes(self) -> int:
        """Number of passes over all rows."""
        return PASSES if self.ranks == GRADIENT_SPECTRUM else len(self.groups)

    @property
    def setting(self) -> str:
        """The configuration key and its value, for messages."""
        return f"adapter.ranks is {self.ranks}"

    @property
    def instead(self) -> str:
        """A setting that needs no training rows, for messages."""
        return "adapter.ranks to uniform"


def choose_ranks(
    model: DynamicLoraModel,
    loss_of_row: Callable[[int], Tensor],
    choice: RankChoice,
    budget: Budget,
    agreement: Agreement,
) -> dict[str, int]:
    """Choose how many components each layer gets; the same on every rank.

    Args:
        model: model whose adapter is at a start that leaves the base's function unchanged.
        loss_of_row: maps the index of a training row to its task loss, summed over its targets; a scalar.
        choice: measure and rows to choose by.
        budget: budget of all components, in parameters.
        agreement: collectives over the ranks, which share the rows.

    Returns:
        Layer name -> number of components, at most the layer's slots.

    Raises:
        ValueError: no row has reached a layer, or its gradient is not finite; on all ranks.
        RankFailedError: a rank has failed; on all ranks.
    """
    layers = model.adapted_layers()
    rows = Rows(model, loss_of_row, choice)
    slots = {name: len(layer.gate) for name, layer in layers.items()}
    with as_in_training(model):
        if choice.ranks == GRADIENT_SPECTRUM:
            spectra = spectra_of_gradients(layers, rows, agreement)
            ranks = by_spectrum(spectra, budget.costs, budget.final)
        else:
            importance = weight_gradients(layers, choice.groups, rows, agreement)
            ranks = by_weight_gradient(importance, budget.costs, budget.final, slots, choice.target_rank)
    empty = sum(not rank for rank in ranks.values())
    say(
        f"chose ranks from {len(choice.rows)} training rows ({choice.setting}): {min(ranks.values())} to "
        f"{max(ranks.values())} components a layer, {sum(ranks.values())} in total"
        + (f"; {empty} of {len(ranks)} layers have none" if empty else "")
    )
    return ranks


def spectra_of_gradients(
    layers: Mapping[str, DynamicLoraLinear], rows: Rows, agreement: Agreement
) -> dict[str, Tensor]:
    """Leading singular values of the gradient of every layer's frozen weight, over all rows.

    Returns:
        Layer name -> singular values, shape ``(slots,)``, float64 on the CPU, the largest first; the same bits on every
        rank.
    """
    probes = draw_probes(layers, {name: [name] for name in layers}, rows.calibration)
    for number in range(1, PASSES):
        probes = next_probes(number, layers, probes, rows, agreement)
    products = products_of(PASSES, layers, probes, rows, agreement)
    sizes = [len(layer.gate) for layer in layers.values()]
    found = torch.zeros(sum(sizes), dtype=torch.float64, device=products.flat.device)
    spectra = dict(zip(layers, found.split(sizes), strict=True))
    with agreement.together("the spectra of the gradients"):
        if agreement.is_first:  # the last bits of a decomposition depend on the processor
            for name, part in products.parts.items():
                spectra[name].copy_(torch.linalg.svdvals(part.double())[: len(spectra[name])])
    agreement.take_first(found)
    return {name: values.cpu() for name, values in spectra.items()}


def weight_gradients(
    layers: Mapping[str, DynamicLoraLinear], groups: Sequence[Sequence[str]], rows: Rows, agreement: Agreement
) -> dict[str, float]:
    """GoRA's importance of every layer: the mean of ``|W o G|`` over the elements of its frozen weight, where G is the
    gradient of all rows' summed loss. Each group takes one pass, with its layers' gradients in memory at once.

    Returns:
        Layer name -> importance; the same bits on every rank.
    """
    found = torch.zeros(len(layers), dtype=torch.float64, device=next(iter(layers.values())).gate.device)
    places = {name: place for place, name in enumerate(layers)}
    for number, names in enumerate(groups, start=1):
        shapes = {name: (len(layers[name].lora_b), layers[name].lora_a.shape[1]) for name in names}
        gradients = Columns(shapes, layers[names[0]].lora_a)
        adders = {name: _dense(total) for name, total in gradients.parts.items()}
        add_up_rows(number, layers, adders, gradients, rows, agreement)
        with agreement.together(f"the weights of pass {number}", runs_model=True), torch.no_grad():
            for name, gradient in gradients.parts.items():
                base = layers[name].base_layer
                with agreement.whole_weight(base):
                    weight = dequantized_weight(base, gradient.dtype)
                found[places[name]] = gradient.mul_(weight).abs_().mean(dtype=torch.float64)
        del gradients, adders  # frees the memory before the next pass
    agreement.take_first(found)
    return dict(zip(layers, found.tolist(), strict=True))


def _dense(total: Tensor) -> Add:
    """``total += sum gradient x'``."""

    @torch.no_grad()
    def add(x: Tensor, gradient: Tensor) -> None:
        total.addmm_(tokens_of(gradient, total.dtype).T, tokens_of(x, total.dtype))

    return add
