"""Starts an adapter from training rows: ``a_i`` along informative directions, ``b_i = 0``, ``c_i = 1``.

With ``inputs``, the directions are the principal directions of a layer's inputs x over all tokens of the rows, the
eigenvectors of ``sum x x'``. With ``gradient``, they are the right singular vectors of the frozen weight's gradient,
``sum g x'``, where g is the gradient of the loss with respect to the layer's output. Neither matrix is built: a few
probes per layer are multiplied in repeated passes over the rows (:mod:`dora_dist.method.subspaces`). With ``lora_one``,
one more pass gives the left singular vectors, and ``b_i`` is not 0: the adapter is one step down the gradient.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.config.adapter import INPUTS, LORA_ONE
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import write_entries
from dora_dist.training.from_data.passes import (
    PASSES,
    Columns,
    Rows,
    as_in_training,
    draw_probes,
    next_probes,
    products_of,
)

GAMMA = 128
"""Divisor of LoRA-One's step (Zhang, Liu and Chen, 2025)."""
LENGTH = 3**-0.5
"""Root mean square length of the rows a_i in LoRA's start, the scale that usual learning rates fit."""


@dataclass(frozen=True, kw_only=True)
class DataStart:
    """How an adapter's start is computed from data.

    Attributes:
        init: ``inputs``, ``gradient`` or ``lora_one``.
        rows: indices of the training rows.
        seed: seed of the probes and of randomness in the base.
    """

    init: str
    rows: Sequence[int]
    seed: int

    @property
    def of_gradient(self) -> bool:
        """Whether the start needs gradients, or inputs alone."""
        return self.init != INPUTS

    @property
    def num_passes(self) -> int:
        """Number of passes over all rows."""
        return PASSES + (self.init == LORA_ONE)

    @property
    def setting(self) -> str:
        """The configuration key and its value, for messages."""
        return f"adapter.init is {self.init}"

    @property
    def instead(self) -> str:
        """A setting that needs no training rows, for messages."""
        return "adapter.init to lora"


def spread(count: int, num_rows: int) -> tuple[int, ...]:
    """Indices of ``count`` rows (all, where there are fewer), spread evenly over the data, because the data may be
    sorted."""
    count = min(count, num_rows)
    return tuple(number * num_rows // count for number in range(count))


def start_from_data(
    model: DynamicLoraModel, loss_of_row: Callable[[int], Tensor], start: DataStart, agreement: Agreement
) -> None:
    """Set the rows ``a_i`` of every layer to directions from data. With ``lora_one``, set ``b_i`` too. Every rank gets
    the same bits.

    Args:
        model: model whose adapter is at LoRA's start: it computes what its base computes.
        loss_of_row: maps the index of a training row to its task loss, summed over its targets; a scalar.
        start: kind of the directions, and the rows that they are computed from.
        agreement: collectives over the ranks, which share the rows.

    Raises:
        ValueError: no row has reached a layer, or its inputs or gradient are not finite; on all ranks.
        RankFailedError: a rank has failed; on all ranks.
    """
    layers = model.adapted_layers()
    rows = Rows(model, loss_of_row, start)
    with as_in_training(model):
        if start.of_gradient:
            groups = {name: [name] for name in layers}
        else:
            with agreement.together("finding layers that read the same tensor", runs_model=True):
                groups = _read_together(layers, rows)
        probes = draw_probes(layers, groups, start)
        for number in range(1, PASSES + 1):
            probes = next_probes(number, layers, probes, rows, agreement)
        images = _images(layers, probes, rows, agreement) if start.init == LORA_ONE else None
    with torch.no_grad():
        for leader, names in groups.items():
            for layer in map(layers.__getitem__, names):
                rank, whole = len(layer.lora_a), torch.ones_like(layer.lora_a, dtype=torch.bool)
                rows_a = probes.parts[leader][:, :rank].T * (LENGTH if images is None else 1)
                write_entries(layer.lora_a, rows_a, whole)
                if images is not None:
                    columns = images.parts[leader][:, :rank]
                    write_entries(layer.lora_b, columns, torch.ones_like(layer.lora_b, dtype=torch.bool))
    moved = ", one step down their gradient instead of at the base" if images is not None else ""
    say(f"the adapter starts from {len(start.rows)} training rows{moved} (adapter.init {start.init})")


def _images(layers: Mapping[str, DynamicLoraLinear], probes: Columns, rows: Rows, agreement: Agreement) -> Columns:
    """LoRA-One's start from the right singular vectors of each layer's gradient G. With ``-G = U S V'`` and S divided
    by its first entry, the result holds ``b_k = u_k sqrt(S_k / gamma)``, shape ``(out, probes)``, and the probes are
    overwritten with ``a_k = v_k sqrt(S_k / gamma)``."""
    images = products_of(PASSES + 1, layers, probes, rows, agreement)
    with agreement.together("LoRA-One's start"):
        if agreement.is_first:
            for name, image in images.parts.items():
                left, values, right = torch.linalg.svd(image.double(), full_matrices=False)
                lengths = (values / (values[0] * GAMMA)).sqrt()
                image.copy_(-left * lengths)
                probes.parts[name].copy_(probes.parts[name].double() @ right.T * lengths)
    agreement.take_first(images.flat)
    agreement.take_first(probes.flat)
    return images


def _read_together(layers: Mapping[str, DynamicLoraLinear], rows: Rows) -> dict[str, list[str]]:
    """First layer -> all layers that read the same tensor, determined with the first row. A layer that this row does
    not reach is in a group of its own."""
    leaders: dict[str, str] = {}
    seen: list[tuple[str, weakref.ref[Tensor], int]] = []

    def looking(name: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            same = (leader for leader, tensor, version in seen if tensor() is x and version == x._version)
            leader = next(same, name)
            seen.append((leader, weakref.ref(x), x._version))
            leaders.setdefault(name, leader)

        return look

    handles = [layer.register_forward_pre_hook(looking(name)) for name, layer in layers.items()]
    try:
        rows.run(rows.calibration.rows[:1])
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(leaders.get(name, name), []).append(name)
    return groups
