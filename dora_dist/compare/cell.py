"""Runs one cell in this process, with its output in the cell's own log file."""

import gc
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dora_dist import train
from dora_dist.compare.methods import ADALORA
from dora_dist.compare.peers.adalora import AdaLora
from dora_dist.compare.peers.eva import Eva
from dora_dist.compare.peers.training import train_peer
from dora_dist.compare.plan import Cell, Plan
from dora_dist.console import files
from dora_dist.console.errors import PreemptedError
from dora_dist.console.phases import Phases
from dora_dist.distributed.heartbeat import HeartbeatMonitor
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.runs import checkpoint
from dora_dist.runs.records import FAILURE, IDENTITY, LOG, record_failure
from dora_dist.training.controller import NonFiniteAdapterError
from dora_dist.training.skipped_steps import NonFiniteLossError

DIVERGED = (NonFiniteLossError, NonFiniteAdapterError)


def run_cell(plan: Plan, cell: Cell, identity: Mapping[str, Any], environment: Mapping[str, Any]) -> str | None:
    """Train and evaluate a cell, or resume it, and delete its checkpoints at the end.

    Args:
        plan: plan of the comparison.
        cell: a cell that is not finished and that no other worker runs.
        identity: everything the cell's results depend on.
        environment: environment in which it runs, for the record.

    Returns:
        None, or why the cell failed; other cells can still run.

    Raises:
        PreemptedError: the process received a signal to stop; the cell may have ended all the same.
    """
    folder = plan.cell_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / IDENTITY, {"identity": identity, "environment": environment})
    (folder / FAILURE).unlink(missing_ok=True)
    reason, diverged = None, False
    with PreemptionNotice() as notice, output_into(folder / LOG):
        try:
            _train(plan, cell, notice)
        except PreemptedError:
            raise
        except Exception as error:
            traceback.print_exc()
            reason, diverged = f"{type(error).__name__}: {error}", isinstance(error, DIVERGED)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if reason is not None:
        record_failure(folder, reason, diverged=diverged)
    else:
        for left in checkpoint.checkpoints(folder):
            shutil.rmtree(left)
    if notice.received is not None:
        raise PreemptedError(f"received {notice.received} when {cell} was ending: no other cell begins")
    return reason


def _train(plan: Plan, cell: Cell, notice: PreemptionNotice) -> None:
    config = plan.run_config(cell)
    peer = plan.method(cell.group).peer
    if peer is not None:
        train_peer(config, AdaLora(plan.config.adalora) if peer == ADALORA else Eva(), notice)
        return
    with (
        Phases("starting") as phases,
        HeartbeatMonitor(None, config.distributed.silent_seconds, phases) as monitor,
    ):
        train.train(config, notice, monitor, has_ranks=True, dry_run=None)


@contextmanager
def output_into(path: Path) -> Iterator[None]:
    """Redirects everything this process writes to the terminal into a file, including libraries' own writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, former in zip((1, 2), kept, strict=True):
                os.dup2(former, number)
                os.close(former)
