"""The training log: adds the method's figures to the Trainer's lines (loss, gradient norm, learning rate)."""

import math
import resource
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dora_dist.training.controller import DynamicRankController
from dora_dist.training.skipped_steps import SkipPolicy


class StepLog:
    """Completes the Trainer's log lines; each line covers the steps since the previous one.

    Args:
        controller: the pruning controller.
        skip_policy: policy that counts the skipped steps.
        weights: name of a loss term other than the task loss, as in a line -> weight of the term.
        device: device of the loss.
        tokens_of: function that returns the number of tokens, over all ranks, in the optimizer steps after its first
            argument up to its second one.
    """

    def __init__(
        self,
        controller: DynamicRankController,
        skip_policy: SkipPolicy,
        weights: Mapping[str, float],
        device: torch.device,
        tokens_of: Callable[[int, int], int],
    ) -> None:
        # Sums of these terms over the steps since the previous line, and the same before the latest step.
        self._sums: Tensor = torch.zeros(len(weights), device=device)
        self._sums_before = self._sums.clone()
        self._controller = controller
        self._skip_policy = skip_policy
        self._weights = dict(weights)
        self._tokens_of = tokens_of
        self._last_line = (0, time.monotonic())

    def start_clock(self, step: int) -> None:
        """Start counting steps and seconds.

        Args:
            step: number of optimizer steps taken so far.
        """
        self._last_line = (step, time.monotonic())

    def begin_step(self) -> None:
        """Must be called before every optimizer step."""
        self._sums_before.copy_(self._sums)

    def forget_step(self) -> None:
        """Remove the terms of the latest step, which was skipped, from the sums."""
        self._sums.copy_(self._sums_before)

    def add(self, name: str, term: Tensor) -> Tensor:
        """Record a micro-batch's share of a term, and return its contribution to the loss; both scalars."""
        self._sums[list(self._weights).index(name)] += term.detach()
        return self._weights[name] * term

    def complete(self, logs: dict[str, float], step: int) -> None:
        """Convert the Trainer's means over all steps to means over the steps that were not skipped, and add the
        method's figures.

        Args:
            logs: the Trainer's line, changed in place. ``loss`` becomes the task loss without the other terms; it is
                removed if all steps were skipped.
            step: number of optimizer steps taken so far.
        """
        last_step, last_time = self._last_line
        steps = max(step - last_step, 1)
        taken = steps - self._skip_policy.forget_logged()
        if taken:
            terms = dict(zip(self._weights, (self._sums / taken).tolist(), strict=True))
            logs |= terms
            logs["loss"] = logs["loss"] * steps / taken - sum(self._weights[name] * terms[name] for name in terms)
        else:
            del logs["loss"]
        self._sums.zero_()
        if self._skip_policy.last:
            logs.pop("grad_norm", None)  # the last step's norm
        logs["components"] = self._controller.num_kept
        now = time.monotonic()
        logs["seconds_per_step"] = (now - last_time) / steps
        logs["tokens_per_second"] = self._tokens_of(last_step, step) / (now - last_time)
        logs["peak_memory_bytes"] = self._peak_memory()
        self._last_line = (step, now)

    def _peak_memory(self) -> int:
        """Peak memory of this rank since its start, in bytes: on a GPU, what torch has allocated; without one, that of
        the process."""
        if self._sums.is_cuda:
            return torch.cuda.max_memory_allocated(self._sums.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def progress(self, logs: Mapping[str, float], step: int, max_steps: int) -> str:
        """A completed line in readable form.

        Args:
            logs: the line, as :meth:`complete` left it.
            step: number of optimizer steps taken so far.
            max_steps: number of optimizer steps of the run.
        """
        minutes_left = (max_steps - step) * logs["seconds_per_step"] / 60
        # Where ranks never change, there is no initial number to compare with.
        start = "" if self._controller.schedule.final_step == 0 else f"/{self._controller.schedule.num_components}"
        loss, norm = (logs.get(name, math.nan) for name in ("loss", "grad_norm"))  # nan: no step was taken
        return (
            f"step {step:>{len(str(max_steps))}}/{max_steps}  loss {loss:.4f}  grad norm {norm:.3f}  "
            f"lr {logs['learning_rate']:.2e}  "
            f"components {logs['components']}{start}  "
            f"{logs['seconds_per_step']:.2f} s/step  {logs['tokens_per_second']:,.0f} tokens/s  "
            f"{minutes_left:.1f} min left"
        )
