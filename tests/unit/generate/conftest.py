"""A run to ask, one for each file of tests."""

from collections.abc import Iterator

import pytest
from support.trained_run import TrainedFolder, make_base, make_run, one_thread


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolder:
    folder = tmp_path_factory.mktemp("generate")
    return make_run(folder / "run", make_base(folder / "base"))
