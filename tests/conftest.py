"""What all tests share: where things are, and libraries kept off the network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from support.repository import REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the checkout: golden trajectory and data sets, not part of the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder 'shared' beside the checkout")
    return folder
