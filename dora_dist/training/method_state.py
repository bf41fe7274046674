"""The state of the method in a checkpoint: adapter, head, masks, scores."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.console.files import write_json
from dora_dist.method.prune_event import PruneEvent
from dora_dist.runs.checkpoint import METHOD_STATE, METHOD_TENSORS, read_method_state
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.training.controller import DynamicRankController

HEAD = "head/"
"""What the names of a head's parameters begin with among the tensors of the method."""


def save_method_state(
    folder: Path, controller: DynamicRankController, fingerprint: Fingerprint, processes: int
) -> None:
    """Write adapter (unfolded), head, masks, smoothed scores, events, the fingerprint of the method, and how many
    processes wrote the checkpoint."""
    tensors = controller.state_dict()
    for name, layer in controller.layers.items():
        tensors |= {f"{name}.{part}": value.detach().cpu().contiguous() for part, value in _parts(layer).items()}
    tensors |= {f"{HEAD}{name}": value.detach().cpu().contiguous() for name, value in controller.head.items()}
    save_file(tensors, folder / METHOD_TENSORS)
    events = [asdict(event) for event in controller.events]
    state = {
        "format": FORMAT_VERSION,
        "step": controller.step,
        "processes": processes,
        "fingerprint": fingerprint.as_dict(),
        "events": events,
    }
    write_json(folder / METHOD_STATE, state)


def load_adapter_parameters(folder: Path, controller: DynamicRankController) -> None:
    """Set the parameters of adapter and head. The checkpoint holds the adapter unfolded beside the folded one for
    PEFT."""
    tensors = load_file(folder / METHOD_TENSORS)
    for name, layer in controller.layers.items():
        for part, parameter in _parts(layer).items():
            parameter.data.copy_(tensors[f"{name}.{part}"])
    for name, parameter in controller.head.items():
        parameter.data.copy_(tensors[f"{HEAD}{name}"])


def load_method_state(folder: Path, controller: DynamicRankController) -> None:
    """Set masks, scores, step and events of the controller, and prove that all ranks loaded the same."""
    state = read_method_state(folder)
    events = [PruneEvent(**event) for event in state["events"]]
    controller.load_state_dict(load_file(folder / METHOD_TENSORS), state["step"], events)


def _parts(layer: DynamicLoraLinear) -> dict[str, Any]:
    return {"lora_a": layer.lora_a, "gate": layer.gate, "lora_b": layer.lora_b}
