"""The state of the method in a checkpoint: adapter, head, masks, scores."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.console.files import write_json
from dora_dist.runs.checkpoint import METHOD_STATE, METHOD_TENSORS
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.training.controller import DynamicRankController

HEAD = "head/"
"""What the names of a head's parameters begin with among the tensors of the method."""


def save_method_state(
    folder: Path, controller: DynamicRankController, fingerprint: Fingerprint, processes: int
) -> None:
    """Write the adapter (unfolded), the head and the state of the controller as tensors; step, number of processes and
    fingerprint as JSON.

    Args:
        folder: Folder of the checkpoint.
        controller: The controller, with its layers and head.
        fingerprint: Settings that a resumed run must not change.
        processes: Number of ranks that write the checkpoint.
    """
    parameters = {name: value.detach().cpu().contiguous() for name, value in _parameters(controller).items()}
    save_file({**controller.state_dict(), **parameters}, folder / METHOD_TENSORS)
    about = {"format": FORMAT_VERSION, "step": controller.step, "processes": processes}
    write_json(folder / METHOD_STATE, {**about, "fingerprint": fingerprint.as_dict()})


def load_parameters(tensors: Mapping[str, Tensor], controller: DynamicRankController) -> None:
    """Set the parameters of adapter and head from the tensors of a checkpoint."""
    for name, parameter in _parameters(controller).items():
        parameter.data.copy_(tensors[name])


def _parameters(controller: DynamicRankController) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in a checkpoint."""
    parameters = {f"{HEAD}{name}": parameter for name, parameter in controller.head.items()}
    for name, layer in controller.layers.items():
        parameters |= {f"{name}.{part}": getattr(layer, part) for part in ("lora_a", "gate", "lora_b")}
    return parameters
