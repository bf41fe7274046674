"""Steps that all ranks skip because the loss or a gradient of some rank is not finite."""

import math
import platform

import torch
from torch import Tensor

from dora_dist.console.errors import ExpectedRunError, mark_common
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement


class NonFiniteLossError(ExpectedRunError):
    """More consecutive steps than distributed.max_skipped_steps had a loss or gradient that is not finite."""


class SkipPolicy:
    """Counts the skipped steps, reports why, and ends the run after too many consecutive ones.

    The engine skips a step where the reduced gradients are not finite, which is the same decision on all ranks
    (:class:`~dora_dist.distributed.engine.SkippedSteps`).

    Args:
        agreement: collectives over the ranks.
        most: largest number of consecutive steps that may be skipped.

    Attributes:
        last: whether the last step was skipped.
    """

    def __init__(self, agreement: Agreement, most: int) -> None:
        self._agreement = agreement
        self._most = most
        self._losses: list[Tensor] = []
        self._in_a_row = 0
        self._since_log = 0

    @property
    def last(self) -> bool:
        return self._in_a_row > 0

    def begin_step(self) -> None:
        """Must be called before every optimizer step."""
        self._losses.clear()

    def guard(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch. If it is not finite, its gradients become NaN too, because an infinite loss can
        have finite gradients."""
        self._losses.append(loss.detach())
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def after_step(self, step: int, skipped: bool) -> str | None:
        """Record the outcome of an optimizer step; must be called on every rank.

        Args:
            step: number of optimizer steps so far, this one included.
            skipped: whether the engine has skipped it, the same on every rank.

        Returns:
            Why the step was skipped, with the ranks whose loss was not finite; None if it was taken.
        """
        if not skipped:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        self._since_log += 1
        bad = [float(loss) for loss in self._losses if not math.isfinite(loss)]
        by_rank = self._agreement.gather((platform.node(), bad[0] if bad else None))
        named = [f"rank {rank} ({node}): loss {loss}" for rank, (node, loss) in enumerate(by_rank) if loss is not None]
        why = "; ".join(named) or "gradients are not finite, although all losses are"
        say(f"step {step} was skipped on all ranks: {why}")
        return why

    def forget_logged(self) -> int:
        """Number of steps skipped since the last call."""
        count, self._since_log = self._since_log, 0
        return count

    def check(self, step: int, why: str, last_good: object) -> None:
        """End the run if too many consecutive steps were skipped.

        Args:
            step: number of optimizer steps so far.
            why: reason for the last skip.
            last_good: the newest complete checkpoint, or None.

        Raises:
            NonFiniteLossError: there were too many; on all ranks.
        """
        if self._in_a_row > self._most:
            count = self._in_a_row
            steps = "1 consecutive step was" if count == 1 else f"{count} consecutive steps were"
            message = (
                f"step {step}: {steps} skipped because of a loss or gradient that is not finite ({why}); "
                f"distributed.max_skipped_steps allows {self._most}. The last good checkpoint: {last_good or 'none'}. "
                "Lower training.learning_rate, or check the data of these steps; if it is the same rank each time, "
                "check its machine"
            )
            raise mark_common(NonFiniteLossError(message))
