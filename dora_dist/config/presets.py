"""Presets: named sets of defaults for the sections ``adapter`` and ``pruning``.

A preset never changes: a run's config.yaml has all its values written out, and new settings get a new name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.checks import nearest
from dora_dist.config.command_line import config_file, options
from dora_dist.config.pruning import PruningConfig

PresetName = Literal["2026-11", "paper", "lora"]
PAPER: PresetName = "paper"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # What docs/evidence.md supports: a start from data, and all pruning within the first tenth.
    "2026-11": {
        "adapter.init": "inputs",
        "pruning.importance": "gate_sensitivity",
        "pruning.budget_unit": "parameters",
        "pruning.equilibrium_weight": 0.0,
        "pruning.warmup_fraction": 0.04,
        "pruning.final_fraction": 0.9,
    },
    # The sections' own defaults.
    PAPER: {},
    # No gates and no pruning.
    "lora": {"adapter.train_gates": False, "pruning.rule": "none"},
}
DEFAULT: PresetName = "2026-11"
"""The preset of a configuration that names none."""
assert PRESETS.keys() == set(get_args(PresetName))
SECTIONS = {"adapter": DynamicLoraConfig(), "pruning": PruningConfig()}
"""The sections that a preset sets defaults of, with their own defaults."""


def default_of(key: str, preset: str) -> Any:
    """The value that a key of :data:`SECTIONS`, such as ``pruning.rule``, has under a preset if nothing sets it."""
    section, name = key.split(".")
    return PRESETS[preset].get(key, getattr(SECTIONS[section], name))


def given_preset(arguments: Sequence[str]) -> str:
    """The preset chosen by a command line and its file.

    Raises:
        ValueError: there is no preset of this name, or it would have no effect.
    """
    name: str = DEFAULT
    complete: Path | None = None
    if path := config_file(arguments):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, Mapping):
            name = preset_of(values)
            complete = path if "format_version" in values else None
    for option, value in options(arguments):
        if option != "preset":
            continue
        if _known(value) != name and complete is not None:
            raise ValueError(
                f"preset is {value}, but {complete} was written by a run and sets every key, from preset {name}: "
                "another preset would have no effect; omit it, or use the file that the run was started with"
            )
        name = value
    return name


def preset_of(values: Mapping[str, Any]) -> str:
    """The preset of a configuration, nested as in the YAML. Runs from before there were presets have the paper's.

    Raises:
        ValueError: there is no preset of this name.
    """
    return _known(values.get("preset", PAPER if "format_version" in values else DEFAULT))


def _known(name: Any) -> str:
    if name not in PRESETS:
        raise ValueError(f"preset is {name}, but must be one of {', '.join(PRESETS)}{nearest(str(name), PRESETS)}")
    return str(name)
