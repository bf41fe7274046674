"""One run of two ranks under ZeRO-2 that several tests compare with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import train
from support.tiny_run import write_config, write_rows


@dataclass(frozen=True)
class Reference:
    """A finished run: its configuration, its folder, and what it printed."""

    config: Path
    run: Path
    output: str


def two_sources(folder: Path) -> dict[str, Any]:
    """A mixture of two training files, and two held-out ones."""
    small = write_rows(folder / "small.jsonl", 7, seed=3)
    return {
        "train": [{"path": str(folder / "train.jsonl"), "weight": 2}, {"path": str(small), "weight": 1}],
        "eval": [str(folder / "eval.jsonl"), str(write_rows(folder / "eval-small.jsonl", 3, seed=4))],
    }


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """12 steps of 2 ranks x 4 examples of two sources under ZeRO-2 with a checkpoint after every step and dropout
    switched on."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_config(folder, adapter={"dropout": 0.1}, data=two_sources(folder))
    finished = train(config)
    return Reference(config, folder / "run", finished.output)


@pytest.fixture(scope="session")
def plain_reference(tmp_path_factory) -> Reference:
    """The same without dropout, whose random numbers depend on how the batch is split, with several examples packed
    into a row; no checkpoints but the last."""
    folder = tmp_path_factory.mktemp("plain")
    packed = {"batching": "packed", "max_length": 48}
    config = write_config(folder, data={**two_sources(folder), **packed}, training={"save_steps": 100})
    finished = train(config)
    return Reference(config, folder / "run", finished.output)
