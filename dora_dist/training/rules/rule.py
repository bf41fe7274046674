"""What the controller asks of a rule: a class for each value of ``pruning.rule``."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import Moments
from dora_dist.method.budget import Budget
from dora_dist.training.criterion import Criterion

Masks = Mapping[str, Tensor]
"""Layer -> boolean, shape ``(r,)``, on the CPU."""


class Rule(Protocol):
    """How events change which components are alive: the same on every rank, by scores that are the same there.

    Attributes:
        regularized: Whether the Dimensional Equilibrium Modulator is part of the loss until the final event.
        renews: Whether an event turns all components into others before it scores them, so that scores of the steps
            before say nothing.
    """

    @property
    def regularized(self) -> bool: ...

    @property
    def renews(self) -> bool: ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What checkpoints keep of the rule itself, on the CPU, the same on every rank: filled in place when a run goes
        on."""
        return {}

    def begin(self, kept: Masks) -> None:
        """What the layers need before the first step, where ``kept`` is alive; no engine has prepared the model."""
        return

    def rates(self, step: int, kept: Masks) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Which entries learn slower than the rest.

        Args:
            step: optimizer step that is about to be taken.
            kept: what the latest event has left.

        Returns:
            Parameters, and for their entries the share of the update that stays, in [0, 1], broadcastable to the shape.
        """
        return ()

    def prepare(self, criterion: Criterion, agreement: Agreement) -> None:
        """An event is due: what it does before scores are compared. With collectives, on every rank."""
        return

    def chooses(self, step: int, budget: Budget) -> bool:
        """Whether an event after a step chooses by scores, which are nothing to choose by where they are all 0.

        Args:
            step: optimizer step after which the event takes place.
            budget: of the run.
        """
        return budget.at(step) != budget.initial

    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        """What is alive after an event.

        Args:
            step: optimizer step after which the event takes place.
            scores: layer -> scores, shape ``(r,)``, the same on every rank.
            kept: what the event before has left.
        """
        ...

    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        """Make it so: in the parameters, their master copies and the masks of the layers.

        Args:
            step: as above.
            kept: as above.
            chosen: what :meth:`select` returned.
            moments: of the optimizer; None where no engine has prepared the model.
        """

    def plan(self, step: int, scores: Mapping[str, Tensor]) -> Mapping[str, int] | None:
        """What the final event has found out for other runs, where it is not what it has left in this one.

        Args:
            step: as above.
            scores: as above.

        Returns:
            Layer -> components, of all layers, that cost the final budget; None where they are those that
            :meth:`select` leaves.
        """
        return None
