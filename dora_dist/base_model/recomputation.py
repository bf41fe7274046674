"""Selects the layers of a model that are computed again in the backward, instead of keeping what their forward saves.

These are the first layers, since recomputing them takes less memory than recomputing the last ones. Let a layer keep
``s`` bytes for its backward, and its input take ``c``. When the backward begins, ``n`` of ``L`` layers are to be
recomputed and keep ``c``; the others keep ``s``. If the last layer is among the ``n``, it is computed again now, which
takes ``s`` more while all others still hold what they keep. If the ``n`` are the first ones, all others have freed
theirs before the backward comes to them. So recomputing all but the last layer takes no more memory than recomputing
all; tests/unit/memory/test_recomputed_memory.py has both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from dora_dist.base_model.shape import text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Recomputation:
    """The number of a model's layers that are computed again in the backward: the first ``count`` of ``layers``."""

    count: int
    layers: int

    def __str__(self) -> str:
        return f"{self.count} of {self.layers}"


def recomputable_layers(model: "PreTrainedModel") -> "list[GradientCheckpointingLayer]":
    """Layers that transformers can compute again one by one, in the order in which the model has them: those of the
    text decoder, of encoder and decoder, or of the encoder."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    prefix = text_decoder(model)
    found: dict[str, GradientCheckpointingLayer] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and name.startswith(prefix) and not inside:
            found[name] = module
    return list(found.values())


def number_of_recomputed(setting: int | str, layers: Sequence[nn.Module], model: str) -> int:
    """Number of layers that ``model.recompute_layers`` asks for, if it is not ``auto``.

    Args:
        setting: ``all``, ``none``, or a number.
        layers: layers that can be recomputed.
        model: path or name of the model, for the message.

    Raises:
        ValueError: the model has fewer layers, or none that can be recomputed one by one.
    """
    if not layers and setting not in ("none", 0):
        raise ValueError(
            f"model.recompute_layers is {setting}, but the layers of {model} cannot be computed again one by one (they "
            "are no GradientCheckpointingLayer of transformers): set it to none, or leave it out and set "
            "training.activation_checkpointing to true, which asks the model itself"
        )
    count = {"none": 0, "all": len(layers)}.get(str(setting), setting)
    assert isinstance(count, int)
    if count > len(layers):
        raise ValueError(f"model.recompute_layers is {count}, but {model} has {len(layers)} layers: set it to all")
    return count


def recompute_first(model: "PreTrainedModel", count: int) -> None:
    """Compute the first layers of a model again in the backward, and no others; in place.

    Uses torch's non-reentrant checkpointing: the reentrant kind runs the backward of a layer as a separate pass, in
    which tensors shared between layers get no gradient.

    Args:
        model: a transformers model, which PEFT may have changed.
        count: number of its :func:`recomputable_layers` to recompute.
    """
    if count:
        # transformers before 5.23 has only the old name, which 5.23 deprecates and 6 is to remove.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for layer in recomputable_layers(model)[count:]:
            layer.gradient_checkpointing = False
