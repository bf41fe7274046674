"""``python -m support.waitless_rank ARGUMENTS``: ``dora_dist.train``, whose ordinary steps must not wait for the GPU.

Forward, backward and what follows the update run under torch's mode that turns a wait into an error. What lies between
them may wait: the update, whose norm says whether the step is taken.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import masking_utils

FIRST = 3
"""Step before which waits are allowed: libraries make their own preparations in the first ones."""


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Within it, but for what transformers (5.23) reads once in a forward: whether the attention needs a mask."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with ExitStack() as stack:
            for name in ("fast_all", "find_packed_sequence_indices"):
                read = _free_to_wait(getattr(masking_utils, name))
                stack.enter_context(mock.patch.object(masking_utils, name, read))
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _free_to_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    return call


def forbid_waits() -> list[int]:
    """From now on a wait in an ordinary step of this process's run raises; steps that were watched are collected."""
    from dora_dist.training.trainer import DynamicLoraTrainer

    watched: list[int] = []

    def without_waits(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(trainer: DynamicLoraTrainer, *args: Any, **kwargs: Any) -> Any:
            controller = trainer.parts.controller
            step = controller.step + 1
            if step < FIRST or controller.schedule.is_prune_step(step):
                return method(trainer, *args, **kwargs)
            watched.append(step)
            with waits_are_errors():
                return method(trainer, *args, **kwargs)

        return call

    for name in ("training_step", "end_step"):
        setattr(DynamicLoraTrainer, name, without_waits(getattr(DynamicLoraTrainer, name)))
    return watched


if __name__ == "__main__":
    from dora_dist.console.command import run_command
    from dora_dist.train import main

    steps = forbid_waits()

    def watched_main() -> None:
        main(sys.argv[1:])
        print(f"watched steps {sorted(set(steps))}", flush=True)

    run_command(watched_main)
