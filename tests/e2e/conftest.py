"""One run of two ranks under ZeRO-2 that several tests compare with."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import train
from tiny_run import write_config


@dataclass(frozen=True)
class Reference:
    """A finished run: its configuration, its folder, and what it printed."""

    config: Path
    run: Path
    output: str


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """12 steps of 2 ranks x 4 examples under ZeRO-2 with a checkpoint after every step and dropout switched on."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_config(folder, adapter={"dropout": 0.1})
    finished = train(config)
    return Reference(config, folder / "run", finished.output)


@pytest.fixture(scope="session")
def plain_reference(tmp_path_factory) -> Reference:
    """The same without dropout, whose random numbers depend on how the batch is split; no checkpoints but the last."""
    folder = tmp_path_factory.mktemp("plain")
    config = write_config(folder, training={"save_steps": 100})
    finished = train(config)
    return Reference(config, folder / "run", finished.output)
