"""One run of two ranks under ZeRO-2 that several tests compare with."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.commands import train
from support.forked_run import run_to_the_end
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


def made_once(name: str, tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], str]) -> Reference:
    """A run that all workers of a test session share. ``make`` makes it once, and returns its output."""
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    folder = (shared or tmp_path_factory.getbasetemp()) / name
    output = folder / "output.txt"
    with FileLock(f"{folder}.lock"):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            output.write_text(make(folder))
    return Reference(folder / "run.yaml", folder / "run", output.read_text())


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """12 steps of 2 ranks x 4 examples of two sources under ZeRO-2 through the real command, with a checkpoint after
    every step and dropout switched on."""

    def make(folder: Path) -> str:
        return train(write_config(folder, adapter={"dropout": 0.1}, data=two_sources(folder))).output

    return made_once("reference", tmp_path_factory, make)


@pytest.fixture(scope="session")
def plain_reference(tmp_path_factory) -> Reference:
    """The same without dropout, whose random numbers depend on how the batch is split, with several examples packed
    into a row; no checkpoints but the last."""

    def make(folder: Path) -> str:
        packed = {"batching": "packed", "max_length": 48}
        config = write_config(folder, data={**two_sources(folder), **packed}, training={"save_steps": 100})
        return run_to_the_end(config, folder / "run", folder / "log")

    return made_once("plain", tmp_path_factory, make)
