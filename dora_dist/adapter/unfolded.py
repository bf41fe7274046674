"""The trained state as a checkpoint keeps it: the adapter with its gates and masks, and the head."""

from collections.abc import Mapping

from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear

HEAD = "head/"
"""Prefix of the names of a head's parameters."""


def trained_parameters(
    layers: Mapping[str, DynamicLoraLinear], head: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in a checkpoint.

    Args:
        layers: adapted layers by name.
        head: parameters that are trained beside them, by name.
    """
    parameters = {f"{HEAD}{name}": parameter for name, parameter in head.items()}
    for name, layer in layers.items():
        parameters |= {f"{name}.{part}": getattr(layer, part) for part in ("lora_a", "gate", "lora_b")}
    return parameters


def load_parameters(
    tensors: Mapping[str, Tensor], layers: Mapping[str, DynamicLoraLinear], head: Mapping[str, nn.Parameter]
) -> None:
    """Set the parameters of adapter and head from the tensors of a checkpoint.

    Raises:
        KeyError: one of them is missing.
        RuntimeError: one of them has another shape.
    """
    for name, parameter in trained_parameters(layers, head).items():
        parameter.data.copy_(tensors[name])


def load_masks(tensors: Mapping[str, Tensor], layers: Mapping[str, DynamicLoraLinear]) -> None:
    """Set the masks of the layers, and their scales, from the tensors of a checkpoint.

    Raises:
        KeyError, RuntimeError: as in :func:`load_parameters`.
    """
    for name, layer in layers.items():
        layer.component_mask.copy_(tensors[f"{name}.component_mask"])
        layer.follow_mask()
