"""The number that says how the files of a run are to be read, and names that tell what a folder holds."""

from pathlib import Path

FORMAT_VERSION = 2
"""Format of ``config.yaml`` in a run's folder, and of checkpoints. It grows by one with a change after which an older
file means something else, or can no longer be read. Files without a number have format 1."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's configuration file, in the folder of an adapter that is plain LoRA."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The tensors of such an adapter, beside it."""
ROUTED_ADAPTER = "routed_adapter.json"
"""The configuration file in the folder of a prompt-routed adapter."""
METHOD_TENSORS = "dynamic_lora.safetensors"
"""Tensors in a checkpoint: the adapter with its gates, head, masks, scores."""
METHOD_STATE = "dynamic_lora.json"
"""JSON in a checkpoint: its format and step, and the settings that a resumed run must not change."""


def refuse_later_format(path: Path, values: object) -> None:
    """Say that the program is too old, rather than that a key is unknown to it.

    Args:
        path: the configuration file.
        values: its values, as YAML gives them.

    Raises:
        ValueError: a later version wrote the file.
    """
    version = values.get("format_version", 1) if isinstance(values, dict) else 1
    if isinstance(version, int) and version > FORMAT_VERSION:  # anything else is refused as a value
        raise ValueError(
            f"{path} has format_version {version}, but this version of dora-dist reads formats up to {FORMAT_VERSION}: "
            "a later version wrote the file. Update dora-dist"
        )
