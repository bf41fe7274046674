"""The method's part of a checkpoint: adapter, head, masks, scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dora_dist.adapter.unfolded import trained_parameters
from dora_dist.config.format_version import FORMAT_VERSION, METHOD_STATE, METHOD_TENSORS
from dora_dist.console.files import write_json
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.training.controller import DynamicRankController


def save_method_tensors(folder: Path, controller: DynamicRankController) -> None:
    """Write the adapter (unfolded), the head and the controller's state to a checkpoint's folder."""
    trained = trained_parameters(controller.layers, controller.head)
    parameters = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
    save_file({**controller.state_dict(), **parameters}, folder / METHOD_TENSORS)


def save_method_state(
    folder: Path,
    controller: DynamicRankController,
    fingerprint: Fingerprint,
    world_size: int,
    best: Mapping[str, Any] | None = None,
) -> None:
    """Write the method's tensors, and as JSON the step, number of processes, fingerprint and best checkpoint.

    Args:
        folder: the checkpoint's folder.
        controller: the controller, with its layers and head.
        fingerprint: settings that a resumed run must not change.
        world_size: number of ranks that write the checkpoint.
        best: state of the search for the best checkpoint; None where there is none.
    """
    save_method_tensors(folder, controller)
    about = {"format": FORMAT_VERSION, "step": controller.step, "processes": world_size}
    found = {} if best is None else {"best": best}
    write_json(folder / METHOD_STATE, {**about, **found, "fingerprint": fingerprint.as_dict()})
