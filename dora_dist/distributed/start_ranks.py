"""Starts the ranks of a run on this machine, as ``accelerate launch`` does, and reports once how they ended.

accelerate's own launcher starts them (torchrun's, for DDP on CPUs). For a failed rank, it would print its own traceback
and exit with status 1. Here every rank leaves a note of how it ended (:func:`dora_dist.console.command.leave`), from
which one message and the exit status come.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dora_dist.console.errors import PREEMPTED
from dora_dist.console.notes import NOTES, Note, read_notes
from dora_dist.console.shipped import shipped
from dora_dist.distributed.launcher import LAUNCH_FILES

RANKS_ON_CPUS = 2
MOST_SHOWN = 3
"""Most different messages of ranks that are shown."""


def number_of_ranks(engine: str, wanted: int | None) -> tuple[int, int]:
    """Number of ranks of a run on this machine, and number of its GPUs.

    Args:
        engine: ``distributed.engine`` of the configuration.
        wanted: ``--processes``; None for one rank for each GPU, or two on a machine without GPUs.

    Raises:
        ValueError: the engine or the GPUs do not allow that many.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"--processes is {wanted}, but must be at least 1")
    if wanted is not None and wanted > 1 and engine == "none":
        raise ValueError(
            f"--processes is {wanted}, but distributed.engine is none, which is one process: set it to zero2 or ddp"
        )
    import torch

    gpus = torch.cuda.device_count()
    if wanted is None:
        return gpus or RANKS_ON_CPUS, gpus
    if 0 < gpus < wanted:
        raise ValueError(f"--processes is {wanted}, but this machine has {gpus} GPUs, and each rank needs one")
    return wanted, gpus


def start_ranks(engine: str, processes: int, gpus: int, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module arguments`` as that many ranks on this machine, and wait for them.

    Args:
        engine: ``zero2`` or ``ddp``.
        processes: number of ranks.
        gpus: number of GPUs of this machine; 0 for ranks on CPUs.
        module: module that each rank runs.
        arguments: command line of the module.

    Returns:
        The exit status of the run: 0, that of a rank that explained itself, or 1.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="dora-dist-ranks-") as folder:
        ended = ""
        with _environment(_variables(engine, processes, gpus, folder)):
            try:
                _launch(engine, processes, gpus, module, arguments)
            except ChildFailedError as error:
                ended = str(error)
            except SignalException as signal:
                ended = f"stopped by {signal.sigval.name}"
        return _conclude(read_notes(Path(folder)), ended)


def _variables(engine: str, processes: int, gpus: int, folder: str) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    found = {
        NOTES: f"{os.getpid()} {folder}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    if not gpus:
        found |= {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {"DS_ACCELERATOR": "cpu"}
    return found


def _launch(engine: str, processes: int, gpus: int, module: str, arguments: Sequence[str]) -> None:
    # Silences the launcher's log of a failed rank: the ranks' notes say what is needed.
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    if engine == "ddp" and not gpus:
        # accelerate 1.15 starts several ranks on CPUs through MPI only.
        from torch.distributed.run import main

        main(["--standalone", "--nproc_per_node", str(processes), "--module", module, *arguments])
        return
    from accelerate.commands.launch import launch_command, launch_command_parser

    folder = shipped("launch")
    options = ["--config_file", str(folder / LAUNCH_FILES[engine, bool(gpus)]), "--num_processes", str(processes)]
    if engine == "zero2":  # the launch file names it relative to the top folder of a checkout
        options += ["--deepspeed_config_file", str(folder / "zero2.json")]
    options += ["--main_process_port", "0", "--module", module, *arguments]
    launch_command(launch_command_parser().parse_args(options))


def _conclude(notes: Mapping[int, Note], launcher: str) -> int:
    """Print what the ranks had to say, each message once, and return the run's exit status.

    Args:
        notes: rank -> its note of how it ended, for ranks that left one.
        launcher: the launcher's message; empty if all ranks ended well.
    """
    if not launcher and not notes:
        return 0
    messages = list(dict.fromkeys(note.message for _, note in sorted(notes.items())))
    for message in messages[:MOST_SHOWN] or [launcher]:
        print(message, file=sys.stderr)
    statuses = {note.status for note in notes.values()}
    return PREEMPTED if PREEMPTED in statuses else max(statuses, default=1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
