"""Real ranks for tests: one process each, joined by gloo, every run with a time limit.

Processes come from a fork server that has the heavy imports behind it, so that a rank starts in a fraction of a
second; each is a process of its own, with its own environment and process group.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "dora_dist.setup.build", "dora_dist.runs.summary", "deepspeed", "support.rank_functions"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class RankOutcome:
    """The outcome of a rank: the value of its function, or the type and text of its exception."""

    value: Any = None
    error_type: str | None = None
    error: str | None = None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90, backend: str = "gloo"
) -> list[RankOutcome]:
    """Run ``function(*args)`` on every rank of a world; fail the test if a rank has not ended in time.

    Args:
        function: function that can be imported by name (the fork server has not imported your test module).
        world_size: number of ranks.
        timeout: time limit for everything, in seconds.
        backend: backend of the process group; ``cuda:gloo`` serves tensors on GPUs only, as NCCL does, and needs no
            GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(_joined, world_size, Path(folder), backend, function, args)
        wait_for_ranks(processes, timeout)
        outcomes = []
        for rank, process in enumerate(processes):
            path = Path(folder) / f"outcome-{rank}"
            assert path.exists(), f"rank {rank} died with exit code {process.exitcode} and left no outcome"
            outcomes.append(_load(path))
        return outcomes


def start_ranks(target: Callable[..., None], world_size: int, *args: Any) -> list[Any]:
    """Start ``target(rank, world_size, *args)`` in one process per rank."""
    processes = [_CONTEXT.Process(target=target, args=(rank, world_size, *args)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def wait_for_ranks(processes: list[Any], timeout: float) -> None:
    """Wait for all ranks; on time-out kill them and fail, naming the ranks that hung."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} were still running after {timeout} s"


def rank_environment(rank: int, world_size: int, **more: str) -> None:
    """Set the variables that a launcher sets, in this process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="-1",
        **more,
    )


def _joined(
    rank: int, world_size: int, folder: Path, backend: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    rank_environment(rank, world_size)
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        outcome = RankOutcome(value=function(*args))
    except Exception as error:
        traceback.print_exc()
        outcome = RankOutcome(error_type=type(error).__name__, error=str(error))
    torch.save(outcome, folder / f"outcome-{rank}")
    os._exit(0)  # a rank whose peer has failed could hang in the process group's destructor


def _load(path: Path) -> RankOutcome:
    import torch

    return torch.load(path, weights_only=False)
