"""The log of optimizer steps: what a line of training says beside loss, gradient norm and learning rate."""

import math
import resource
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dora_dist.training.controller import DynamicRankController
from dora_dist.training.skipped_steps import SkipPolicy


class StepLog:
    """Completes the Trainer's lines of training, each of which covers the steps since the line before.

    Args:
        controller: The method.
        skip_policy: Knows the steps that were left out since the last line.
        weights: Weights in the loss of the terms beside the task loss, by their names in a line.
        device: Where the loss is computed.
        tokens_of: Tokens of the optimizer steps after one number up to another, on all ranks together.

    Attributes:
        term_sums: Shape ``(terms,)`` on ``device``; the sums of these terms over the steps since the last line.
    """

    def __init__(
        self,
        controller: DynamicRankController,
        skip_policy: SkipPolicy,
        weights: Mapping[str, float],
        device: torch.device,
        tokens_of: Callable[[int, int], int],
    ) -> None:
        self.term_sums: Tensor = torch.zeros(len(weights), device=device)
        self._controller = controller
        self._skip_policy = skip_policy
        self._weights = dict(weights)
        self._tokens_of = tokens_of
        self._last_line = (0, time.monotonic())

    def start_clock(self, step: int) -> None:
        """Count steps and seconds from here on.

        Args:
            step: Optimizer steps taken so far.
        """
        self._last_line = (step, time.monotonic())

    def add(self, name: str, term: Tensor) -> Tensor:
        """Note a micro-batch's share of a term, and return what it adds to the loss; both scalars."""
        self.term_sums[list(self._weights).index(name)] += term.detach()
        return self._weights[name] * term

    def complete(self, logs: dict[str, float], step: int) -> None:
        """Turn the Trainer's means over all steps into means over the steps that were taken, and add the figures of
        the method.

        Args:
            logs: The Trainer's line, changed in place. ``loss`` becomes the task loss without the other terms; it is
                removed where every step was left out.
            step: Optimizer steps taken so far.
        """
        last_step, last_time = self._last_line
        steps = max(step - last_step, 1)
        taken = steps - self._skip_policy.forget_logged()
        if taken:
            terms = dict(zip(self._weights, (self.term_sums / taken).tolist(), strict=True))
            logs |= terms
            logs["loss"] = logs["loss"] * steps / taken - sum(self._weights[name] * terms[name] for name in terms)
        else:
            del logs["loss"]
        self.term_sums.zero_()
        if self._skip_policy.last:
            logs.pop("grad_norm", None)  # it is that of the last step
        logs["components"] = self._controller.num_kept
        now = time.monotonic()
        logs["seconds_per_step"] = (now - last_time) / steps
        logs["tokens_per_second"] = self._tokens_of(last_step, step) / (now - last_time)
        logs["peak_memory_bytes"] = self._peak_memory()
        self._last_line = (step, now)

    def _peak_memory(self) -> int:
        """Bytes that this rank has used at most since it started: of its GPU, as torch allocates; without one, of the
        process."""
        if self.term_sums.is_cuda:
            return torch.cuda.max_memory_allocated(self.term_sums.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux counts in KiB

    def progress(self, logs: Mapping[str, float], step: int, max_steps: int) -> str:
        """A completed line for a person.

        Args:
            logs: As :meth:`complete` left it.
            step: Optimizer steps taken so far.
            max_steps: Optimizer steps of the run.
        """
        minutes_left = (max_steps - step) * logs["seconds_per_step"] / 60
        # Where ranks never change, there is nothing to compare them with.
        start = "" if self._controller.schedule.final_step == 0 else f"/{self._controller.schedule.num_components}"
        loss, norm = (logs.get(name, math.nan) for name in ("loss", "grad_norm"))  # nan: no step was taken
        return (
            f"step {step:>{len(str(max_steps))}}/{max_steps}  loss {loss:.4f}  grad norm {norm:.3f}  "
            f"lr {logs['learning_rate']:.2e}  "
            f"components {logs['components']}{start}  "
            f"{logs['seconds_per_step']:.2f} s/step  {logs['tokens_per_second']:,.0f} tokens/s  "
            f"{minutes_left:.1f} min left"
        )
