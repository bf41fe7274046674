"""The interface between the controller and a pruning rule (one class for each value of ``pruning.rule``)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import Moments
from dora_dist.method.budget import Budget
from dora_dist.training.criterion import Criterion

Masks = Mapping[str, Tensor]
"""Layer -> boolean, shape ``(r,)``, on the CPU."""


class Rule(ABC):
    """How events change which components are alive. The scores and the result are the same on every rank.

    Args:
        layers: adapted layers by name; the same names on every rank.
        budget: budget of the layers' components over the run.

    Attributes:
        regularized: whether the Dimensional Equilibrium Modulator is part of the loss until the final event.
        renews: whether an event replaces all components before it scores them, which makes scores of earlier steps
            meaningless.
        reuses: Whether the components that an event adds are new ones in slots that others may have had. Their scores
            start at 0.
    """

    regularized = False
    renews = False
    reuses = False

    def __init__(self, layers: Mapping[str, DynamicLoraLinear], budget: Budget) -> None:
        self._layers = dict(sorted(layers.items()))
        self._budget = budget

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The rule's own state for checkpoints, on the CPU, the same on every rank. A resumed run fills it in place."""
        return {}

    def begin(self, kept: Masks) -> None:
        """Prepare the layers before the first step. The components in ``kept`` are alive; no engine has prepared the
        model yet."""
        return

    def rates(self, step: int, kept: Masks) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Entries that learn more slowly than the rest.

        Args:
            step: optimizer step that is about to be taken.
            kept: components that the latest event kept.

        Returns:
            Pairs of a parameter and the share of the update that each entry takes, in [0, 1], broadcastable to the
            parameter's shape.
        """
        return ()

    def is_due(self, step: int) -> bool:
        """Whether an event takes place after this optimizer step."""
        return self._budget.schedule.is_prune_step(step)

    def prepare(self, criterion: Criterion, agreement: Agreement) -> None:
        """Called when an event is due, before scores are compared. May use collectives; called on every rank."""
        return

    def chooses(self, step: int) -> bool:
        """Whether the event after this step selects by scores; if it does, scores that are all 0 are an error.

        Args:
            step: optimizer step after which the event takes place.
        """
        return self._budget.at(step) != self._budget.initial

    @abstractmethod
    def select(self, step: int, scores: Mapping[str, Tensor], kept: Masks) -> Masks:
        """Components that are alive after an event.

        Args:
            step: optimizer step after which the event takes place.
            scores: layer -> scores, shape ``(r,)``, the same on every rank.
            kept: components that the previous event kept.
        """

    @abstractmethod
    def apply(self, step: int, kept: Masks, chosen: Masks, moments: Moments | None) -> None:
        """Apply the selection to the layers' parameters, their master copies and their masks.

        Args:
            step: optimizer step after which the event takes place.
            kept: components that the previous event kept.
            chosen: the result of :meth:`select`.
            moments: the optimizer's moments; None where no engine has prepared the model.
        """

    def plan(self, step: int, scores: Mapping[str, Tensor]) -> Mapping[str, int] | None:
        """Ranks that the final event plans for later runs, if they differ from what it keeps in this one.

        Args:
            step: optimizer step after which the event takes place.
            scores: layer -> scores, shape ``(r,)``, the same on every rank.

        Returns:
            Layer -> number of components, for all layers, at the cost of the final budget. None if they are those that
            :meth:`select` keeps.
        """
        return None
