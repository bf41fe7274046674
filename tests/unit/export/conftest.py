"""A run to export, one for each file of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trained_run import TrainedFolder, make_base, make_run, one_thread


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TrainedFolder:
    return make_run(tmp_path_factory.mktemp("runs") / "run", base)
