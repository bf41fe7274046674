"""What all tests share: where things are, which of them run, and libraries kept off the network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from support.lanes import PARTS, Lane, UnknownPartError, select
from support.repository import REPOSITORY

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever library comes first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", default=os.environ.get("CI_FULL", ""), help="parts of the full lane, or all (CI_FULL)")
    parser.addoption("--named", action="store_true", help="run all tests of the paths, of whatever lane")


def pytest_configure(config: pytest.Config) -> None:
    # Only the process that was started sees the user's paths; pytest-xdist hands its options to the workers.
    if config.args_source is pytest.Config.ArgsSource.ARGS and not hasattr(config, "workerinput"):
        config.option.named = True
    try:
        _lane(config)
    except UnknownPartError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:], dropped = select(items, _lane(config))
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _lane(config).is_fast:
        terminalreporter.write_line(f"fast lane only; CI_FULL=PART,... runs parts of the full lane: {', '.join(PARTS)}")


def _lane(config: pytest.Config) -> Lane:
    return Lane(config.option.full, config.option.named)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the checkout: golden trajectory and data sets, not part of the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder 'shared' beside the checkout")
    return folder
