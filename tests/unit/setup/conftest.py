"""A small run, for tests of what is decided of it."""

from pathlib import Path

import pytest
from accelerate import PartialState
from support.tiny_run import write_config


@pytest.fixture(autouse=True)
def one_process() -> None:
    """The process state that the entry point sets up first."""
    PartialState()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Its configuration."""
    return write_config(tmp_path)
