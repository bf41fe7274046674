"""What is trained, as a checkpoint keeps it: the adapter with its gates and masks, and the head."""

from collections.abc import Mapping

from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear

HEAD = "head/"
"""What the names of a head's parameters begin with."""


def trained_parameters(
    layers: Mapping[str, DynamicLoraLinear], head: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in a checkpoint.

    Args:
        layers: Adapted layers by name.
        head: Parameters that are trained beside them, by name.
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
        KeyError: One of them is not there.
        RuntimeError: One of them has another shape.
    """
    for name, parameter in trained_parameters(layers, head).items():
        parameter.data.copy_(tensors[name])


def load_masks(tensors: Mapping[str, Tensor], layers: Mapping[str, DynamicLoraLinear]) -> None:
    """Set the masks of the layers, and their scales, from the tensors of a checkpoint.

    Raises:
        KeyError, RuntimeError: As of :func:`load_parameters`.
    """
    for name, layer in layers.items():
        layer.component_mask.copy_(tensors[f"{name}.component_mask"])
        layer.follow_mask()
