"""Workers of a comparison: processes of this machine, each with one GPU or none, or the ranks of a launcher."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from dora_dist.console.errors import PREEMPTED

WORKER = "--worker-of"
"""Option of the process that a worker is, with the number of workers."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "ROLE_", "FSDP_")


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher tells its ranks: a worker is a world of its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def worker_environment(
    environment: Mapping[str, str], number: int, workers: int, gpus: Sequence[str]
) -> dict[str, str]:
    """Of the worker with this number on its machine: one GPU, or its share of the cores.

    Args:
        environment: of this process.
        number: of the worker, from 0.
        workers: on this machine.
        gpus: of this machine.
    """
    own = alone(environment)
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    else:
        own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    return own


def become_worker(arguments: Sequence[str]) -> None:
    """Turn a launcher's rank into a worker: the same process, begun anew without the launcher's variables and before
    anything has touched a GPU. Does not return."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own = worker_environment(os.environ, int(os.environ["LOCAL_RANK"]), here, visible_gpus(os.environ))
    os.execve(sys.executable, _command(arguments, int(os.environ["WORLD_SIZE"])), own)


def run_workers(arguments: Sequence[str], workers: int, gpus: Sequence[str]) -> int:
    """Start workers and wait for them. SIGTERM, SIGUSR1 and SIGINT are handed on.

    Returns:
        The worst of their exit statuses; :data:`~dora_dist.console.errors.PREEMPTED` where one was told to stop.
    """
    running = [
        subprocess.Popen(_command(arguments, workers), env=worker_environment(os.environ, number, workers, gpus))
        for number in range(workers)
    ]

    told = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    former = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        statuses = [process.wait() for process in running]
    except KeyboardInterrupt:  # the terminal has sent it to all of them
        statuses = [process.wait() for process in running]
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if told or PREEMPTED in statuses:
        return PREEMPTED
    return max((abs(status) for status in statuses), default=0)


def _command(arguments: Sequence[str], workers: int) -> list[str]:
    return [sys.executable, "-m", "dora_dist.compare", *arguments, WORKER, str(workers)]
