"""The entry point's ``main`` on real ranks, and other commands, from a fork server with the imports behind it.

What a launcher does is to set a few variables. Here a test sets them, which saves the quarter of a minute that the
imports of launcher and ranks take. Tests of the command itself use ``commands.py``.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from support.commands import Finished
from support.ranks import rank_environment, start_ranks, wait_for_ranks
from support.repository import REPOSITORY
from support.tiny_run import write_config

RANKS = 2
LAUNCHED_AS = {
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "none": {},
}
"""Engine -> environment variables that its launcher sets."""


def train_rank(rank: int, world_size: int, arguments: list[str], port: int, log: str, engine: str = "zero2") -> None:
    """One rank of ``accelerate launch -m dora_dist.train``, its output in a file."""
    rank_environment(rank, world_size, MASTER_PORT=str(port), HF_HUB_OFFLINE="1", **LAUNCHED_AS[engine])
    _print_into(f"{log}-{rank}")
    from dora_dist.console import command
    from dora_dist.runs import claim
    from dora_dist.train import main

    command.LINGER_SECONDS = 1.0  # no launcher ends the others here; they still read from rank 0's store why it ends
    command.LAST_ACT_SECONDS = 60.0  # on a loaded machine too, the page is written before the process ends
    claim.BEAT_SECONDS = 1.0
    command.run_command(lambda: main(arguments))


def run_forked(*arguments: str, timeout: float = 120, **environment: str) -> Finished:
    """``dora-dist`` with these arguments, in a process of its own; exit status and what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        (process,) = start_ranks(_command, 1, list(map(str, arguments)), str(log), environment)
        wait_for_ranks([process], timeout)
        return Finished(process.exitcode, log.read_text())


def _command(_: int, __: int, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="-1")
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    _print_into(log)
    sys.argv = ["dora-dist", *arguments]
    from dora_dist.__main__ import run

    run()


def _print_into(log: str) -> None:
    """Send what this process prints into a file, line by line."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)


def start_run(
    config: Path,
    output: Path,
    log: Path,
    *overrides: str,
    ranks: int = RANKS,
    target: Callable[..., None] = train_rank,
    more: tuple[Any, ...] = (),
) -> list[Any]:
    """Start all ranks; their output goes into files beside ``log``.

    Args:
        config: the run's YAML file.
        output: the run's folder.
        log: prefix of the files with the ranks' output.
        overrides: further arguments of the command line.
        ranks: number of ranks.
        target: function that a rank runs, with the arguments of :func:`train_rank`.
        more: further arguments of ``target``.
    """
    arguments = ["--config", str(config), "--output_dir", str(output), *overrides]
    return start_ranks(target, ranks, arguments, free_port(), str(log), *more)


def run_to_the_end(
    config: Path, output: Path, log: Path, *overrides: str, ranks: int = RANKS, engine: str = "zero2"
) -> str:
    """A run that must succeed; returns what it printed."""
    overrides = ("--distributed.engine", engine, *overrides)
    processes = start_run(config, output, log, *overrides, ranks=ranks, more=(engine,))
    wait_for_ranks(processes, timeout=120)
    text = log_of(log, ranks)
    assert [process.exitcode for process in processes] == [0] * ranks, text
    return text


def finished_run(folder: Path, **sections: Any) -> tuple[Path, str]:
    """Configuration of a run of two ranks under ZeRO-2 into ``folder/run`` (see
    :func:`~support.tiny_run.write_config`), which has ended, and what it printed."""
    config = write_config(folder, **sections)
    return config, run_to_the_end(config, folder / "run", folder / "log")


def run_that_fails(config: Path, output: Path, log: Path, *overrides: str, ranks: int = RANKS) -> tuple[int, str]:
    """A run whose ranks must all end with the same exit status, not 0; that status, and what they printed."""
    processes = start_run(config, output, log, *overrides, ranks=ranks)
    wait_for_ranks(processes, timeout=120)
    text = log_of(log, ranks)
    (status,) = {process.exitcode for process in processes}
    assert status != 0, text
    return status, text


def runs_left_alone(config: Path, overrides: Callable[[int], tuple[str, ...]]) -> Callable[[int], Path]:
    """Number of ranks -> the folder of a run on them that was never interrupted, made when it is first asked for.

    Args:
        config: YAML file of the runs, whose folders are put beside it.
        overrides: number of ranks -> further arguments of the command line.
    """

    @cache
    def of(ranks: int) -> Path:
        output = config.parent / f"whole-{ranks}"
        run_to_the_end(config, output, config.parent / f"whole-{ranks}.log", *overrides(ranks), ranks=ranks)
        return output

    return of


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_of(log: Path, ranks: int = RANKS) -> str:
    """What all ranks have printed."""
    return "\n".join(Path(f"{log}-{rank}").read_text() for rank in range(ranks))
