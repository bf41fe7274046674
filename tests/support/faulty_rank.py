"""A rank of ``dora_dist.train`` in which something breaks, at an exact place of the program."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from support.forked_run import train_rank

Faults = dict[int, dict[str, Any]]
"""Rank -> fault -> where. ``kill``, ``stop``, ``hang``, ``raise`` (a ``kind``), ``worker`` (kill the data workers) and
``memory`` (a limit of memory, and more is wanted) take a place: ``forward N``, ``event N`` or ``save N``, with N the
optimizer step, or ``evaluation``; ``loss`` takes steps and values."""


def faulty_rank(
    rank: int, world_size: int, arguments: list[str], port: int, log: str, faults: Faults, engine: str = "zero2"
) -> None:
    """One rank; what breaks on it is in ``faults``."""
    mine = faults.get(rank, {})
    if mine:
        _break_at_places(mine)
    if "loss" in mine:
        _spoil_loss(mine["loss"])
    train_rank(rank, world_size, arguments, port, log, engine)


def _break_at_places(mine: dict[str, Any]) -> None:
    from dora_dist.evaluation.evaluator import Evaluator
    from dora_dist.training.controller import DynamicRankController as Controller
    from dora_dist.training.trainer import DynamicLoraTrainer as Trainer

    compute_loss, verify, save = Trainer.compute_loss, Controller.verify, Trainer._save_optimizer_and_scheduler
    measure_share = Evaluator._local_parts

    def arrive(place: str) -> None:
        if mine.get("kill") == place:
            os.kill(os.getpid(), signal.SIGKILL)
        if mine.get("stop") == place:
            os.kill(os.getpid(), signal.SIGSTOP)
        if mine.get("worker") == place:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        if mine.get("raise") == place:
            kind = {"RuntimeError": RuntimeError, "ValueError": ValueError}[mine["kind"]]
            raise kind("something of this rank's own")
        if mine.get("memory") == place:
            want_more_memory_than_allowed()
        if mine.get("hang") == place:
            time.sleep(1000)

    def computing(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        arrive(f"forward {trainer.state.global_step + 1}")
        return compute_loss(trainer, *args, **kwargs)

    def verifying(controller: Any, what: str) -> None:
        if "event" in what:
            arrive(f"event {controller.step}")
        verify(controller, what)

    def saving(trainer: Any, folder: str) -> None:
        save(trainer, folder)
        arrive(f"save {trainer.state.global_step}")

    def evaluating(evaluator: Any, model: Any) -> Any:
        arrive("evaluation")
        return measure_share(evaluator, model)

    Trainer.compute_loss, Controller.verify, Trainer._save_optimizer_and_scheduler = computing, verifying, saving
    Evaluator._local_parts = evaluating


def want_more_memory_than_allowed() -> None:
    """Limit the memory of this process, or of its GPU where it has one, and let torch's own allocator fail on it."""
    import torch

    if torch.cuda.is_available():
        wanted = torch.cuda.memory_reserved() + 2**31
        torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
        torch.empty(wanted, dtype=torch.uint8, device="cuda")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.empty(2**30, dtype=torch.uint8)


def _spoil_loss(values: dict[int, float]) -> None:
    from transformers import Trainer

    compute_loss = Trainer.compute_loss

    def computing(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = compute_loss(trainer, *args, **kwargs)
        value = values.get(trainer.state.global_step + 1)
        # An infinite loss whose gradients are finite, which no look at gradients would find.
        return (loss if value is None else loss + value), outputs

    Trainer.compute_loss = computing
