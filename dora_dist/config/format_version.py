"""The number that says how the files of a run are to be read, and names that tell what a folder holds."""

from pathlib import Path

import yaml

FORMAT_VERSION = 2
"""Format of ``config.yaml`` in a run's folder, and of checkpoints. It grows by one with a change after which an older
file means something else, or can no longer be read. Files without a number have format 1."""
ADAPTER_CONFIG = "adapter_config.json"
"""In the folder of an adapter that is plain LoRA: PEFT's own file."""
ROUTED_ADAPTER = "routed_adapter.json"
"""In the folder of a prompt-routed one."""
METHOD_TENSORS = "dynamic_lora.safetensors"
"""In a checkpoint: adapter with its gates, head, masks, scores."""
METHOD_STATE = "dynamic_lora.json"
"""In a checkpoint: its format and step, and what must not change when training goes on from it."""


def read_version(path: Path) -> int:
    """Format of a configuration file; see :data:`FORMAT_VERSION`."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    version = written.get("format_version", 1) if isinstance(written, dict) else 1
    return version if isinstance(version, int) else 1  # anything else is refused as a value


def refuse_later_format(path: Path) -> None:
    """Say that the program is too old, rather than that a key is unknown to it.

    Raises:
        ValueError: a later version wrote the file.
    """
    version = read_version(path)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, but this version of dora-dist reads formats up to {FORMAT_VERSION}: "
            "a later version wrote the file. Update dora-dist"
        )
