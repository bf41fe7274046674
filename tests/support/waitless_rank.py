"""``python -m support.waitless_rank ARGUMENTS``: ``dora_dist.train``, whose ordinary steps must not wait for the GPU.

Forward, backward and what follows the update run under torch's mode that turns a wait into an error. What lies between
them may wait: the update, whose norm says whether the step is taken.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

FIRST = 3
"""Step before which waits are allowed: libraries make their own preparations in the first ones."""


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
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(trainer, *args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

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
