"""Starts the workers of a comparison: processes on this machine with one GPU or none, or a launcher's ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from dora_dist.console.errors import PREEMPTED

WORKER = "--worker-of"
"""Option that makes a process a worker; its value is the number of workers."""
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
    """The environment without a launcher's variables: each worker is a world of its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }


def leave_launcher() -> None:
    """Take a launcher's variables out of this process, which then computes as the workers do that it might start:
    accelerate would change the precision of PEFT's methods."""
    for name in os.environ.keys() - alone(os.environ).keys():
        del os.environ[name]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def worker_environment(
    environment: Mapping[str, str], number: int, workers: int, gpus: Sequence[str]
) -> dict[str, str]:
    """The environment of a worker: one GPU, or its share of the cores.

    Args:
        environment: environment of this process.
        number: number of the worker on this machine, from 0.
        workers: number of workers on this machine.
        gpus: names of this machine's GPUs.
    """
    own = alone(environment)
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    else:
        own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    return own


def become_worker(arguments: Sequence[str]) -> None:
    """Turn a launcher's rank into a worker: restart the same process without the launcher's variables, before anything
    has used a GPU. Does not return."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own = worker_environment(os.environ, int(os.environ["LOCAL_RANK"]), here, visible_gpus(os.environ))
    os.execve(sys.executable, _command(arguments, int(os.environ["WORLD_SIZE"])), own)


def run_workers(arguments: Sequence[str], workers: int, gpus: Sequence[str]) -> int:
    """Start workers and wait for them. SIGTERM, SIGUSR1 and SIGINT are forwarded to them.

    Returns:
        The worst of their exit statuses; :data:`~dora_dist.console.errors.PREEMPTED` if such a signal was received.
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
    except KeyboardInterrupt:  # the terminal has sent SIGINT to all workers
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
