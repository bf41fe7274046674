"""``python -m support.waitless_rank ARGUMENTS``: ``dora_dist.train``, whose ordinary steps must not wait for the GPU.

Forward, backward and what follows the update run under torch's mode that turns a wait into an error. The update between
them may wait: its norm decides whether the step is taken.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import masking_utils

FIRST = 3
"""First step in which waits are forbidden: in earlier steps, libraries make their own preparations."""


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Context in which waits are errors, except for what transformers (5.23) reads once in a forward: whether the
    attention needs a mask."""
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
    """Let a wait in an ordinary step of this process's run raise from now on; the list collects the watched steps."""
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
