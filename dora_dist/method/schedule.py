"""The budget over time: how many components of the whole model are pruned by a given step (equation 9).

The form follows the authors' released code, which reaches its target; the printed equation does not.
Every step here is an *optimizer* step, counted from 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

EVENTS = 20
"""Number of events that the intervals of :func:`automatic_interval` and :func:`twentieth_of_phase` start from."""

FIRST_SCORED_STEP = 3
"""Earliest optimizer step of a final event. Step 1 may have a learning rate of 0, step 2 then moves the components that
start at 0, and so step 3 is the first in which every gate has a gradient."""


def automatic_interval(total_steps: int, warmup_fraction: float, final_fraction: float) -> int:
    """Interval between two events, in optimizer steps, for scores that are summed since the last event.

    The final event fixes the mask, and sees only the steps since the event before it. Of the intervals that give at
    most :data:`EVENTS` events after the first and more than half as many, it is the one of which the final event sees
    the largest share; of several such, the shortest. 1 where the phase has up to :data:`EVENTS` steps.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_fraction: share of the steps before pruning may begin.
        final_fraction: share of the steps after the final event.
    """
    phase = _phase(total_steps, warmup_fraction, final_fraction)
    shortest = -(-phase // EVENTS)
    return max(range(shortest, 2 * shortest), key=lambda interval: ((phase - 1) % interval + 1) / interval)


def twentieth_of_phase(total_steps: int, warmup_fraction: float, final_fraction: float) -> int:
    """Interval between two events, in optimizer steps, for all other scores, which do not depend on when the last event
    was; ``preset: paper`` has it. It gives :data:`EVENTS` events or up to twice as many.

    Args:
        total_steps, warmup_fraction, final_fraction: the arguments of :func:`automatic_interval`.
    """
    return max(1, _phase(total_steps, warmup_fraction, final_fraction) // EVENTS)


def _phase(total_steps: int, warmup_fraction: float, final_fraction: float) -> int:
    """``t_max``: steps from the first event to the last. 1 where that is shorter than a step: a short run then still
    has an event."""
    return max(1, int(total_steps * (1 - warmup_fraction - final_fraction)))


class Schedule(Protocol):
    """What a budget and a controller need from a schedule."""

    @property
    def num_components(self) -> int:
        """Components of the whole model at the start."""

    @property
    def final_step(self) -> int:
        """Optimizer step of the last event; the mask is fixed from then on. 0: before the first step."""

    @property
    def prune_steps(self) -> list[int]:
        """All steps at which :meth:`is_prune_step` holds, in order."""

    def is_prune_step(self, step: int) -> bool:
        """Whether an event takes place after optimizer step ``step``."""

    def in_warmup(self, step: int) -> bool:
        """Whether a step is in the warm-up, in which nothing may change."""

    def removed(self, step: int, removable: int) -> int:
        """Units removed after an event at ``step``, out of the ``removable`` ones that the final event has removed."""

    def cost_at_start(self, costs: Mapping[str, int]) -> int:
        """Total cost of the components at the start, given the cost of one component of each layer."""

    def cost_at_end(self, costs: Mapping[str, int]) -> int:
        """Largest total cost of the components that remain after the final event."""


@dataclass(frozen=True)
class FixedRanks:
    """A schedule without events: the initial ranks stay.

    Args:
        ranks: layer name -> number of components.
    """

    ranks: Mapping[str, int]

    final_step = 0

    @property
    def num_components(self) -> int:
        """Components of the whole model."""
        return sum(self.ranks.values())

    @property
    def prune_steps(self) -> list[int]:
        """Empty."""
        return []

    def is_prune_step(self, step: int) -> bool:
        """Always False."""
        return False

    def in_warmup(self, step: int) -> bool:
        """Always False."""
        return False

    def removed(self, step: int, removable: int) -> int:
        """Always 0."""
        return 0

    def cost_at_start(self, costs: Mapping[str, int]) -> int:
        """Total cost of the components."""
        return sum(costs[name] * rank for name, rank in self.ranks.items())

    def cost_at_end(self, costs: Mapping[str, int]) -> int:
        """The cost at the start."""
        return self.cost_at_start(costs)


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """Cubic pruning schedule between a warm-up and a final phase of constant budget.

    With ``T = total_steps``, ``t = int(step - T * warmup_fraction)`` and
    ``t_max = int(T * (1 - warmup_fraction - final_fraction))``, the number of components pruned by a step is
    ``int(num_layers * (initial_rank - target_rank) * (t / t_max)**3)`` for ``0 <= t <= t_max``.
    ``t_max`` is at least 1, and the final event is at step :data:`FIRST_SCORED_STEP` or later, if the run has so many.

    Args:
        total_steps: optimizer steps of the whole run.
        num_layers: number of adapted layers.
        initial_rank: components of each layer at the start.
        target_rank: components of each layer, on average, after the final event.
        warmup_fraction: share of the steps before pruning may begin, in [0, 1).
        final_fraction: share of the steps after the final event, in [0, 1).
        interval: optimizer steps between two events.

    Raises:
        ValueError: a value is out of range, or the run is too short for the requested phases.
    """

    total_steps: int
    num_layers: int
    initial_rank: int
    target_rank: int
    warmup_fraction: float = 0.15
    final_fraction: float = 0.5
    interval: int = 100

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_layers", "target_rank", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        self._check_ranks()
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie in [0, 1)")
        if self.final_step > self.total_steps or self.warmup_fraction + self.final_fraction >= 1:
            raise ValueError(
                f"{self.total_steps} optimizer steps with warmup_fraction {self.warmup_fraction} and final_fraction "
                f"{self.final_fraction} leave no step to prune in: lower the fractions (they must sum to less "
                "than 1) or train for more steps"
            )

    @property
    def num_components(self) -> int:
        """Components of the whole model at the start."""
        return self.num_layers * self.initial_rank

    @property
    def final_num_kept(self) -> int:
        """Components of the whole model after the final event."""
        return self.num_layers * self.target_rank

    @property
    def final_step(self) -> int:
        """Optimizer step of the last event; the mask is fixed from then on."""
        guess = int(self._last + self.total_steps * self.warmup_fraction)
        final = next(step for step in range(max(guess, 1), guess + 3) if self._position(step) == self._last)
        return max(final, min(FIRST_SCORED_STEP, self.total_steps))

    @property
    def prune_steps(self) -> list[int]:
        """All steps at which :meth:`is_prune_step` holds, in order."""
        return [step for step in range(1, self.final_step + 1) if self.is_prune_step(step)]

    def num_pruned(self, step: int) -> int:
        """Components of the whole model that an event at ``step`` leaves pruned.

        Exact integer arithmetic: floating point could lose one component to rounding.
        """
        return self.removed(step, self.num_layers * (self.initial_rank - self.target_rank))

    def removed(self, step: int, removable: int) -> int:
        """Units removed after an event at ``step``, out of the ``removable`` ones that the final event has removed."""
        position = min(max(self._position(step), 0), self._last)
        return removable * position**3 // self._last**3

    def cost_at_start(self, costs: Mapping[str, int]) -> int:
        """Total cost of the components at the start, given the cost of one component of each layer."""
        return self.initial_rank * sum(costs.values())

    def cost_at_end(self, costs: Mapping[str, int]) -> int:
        """Largest total cost of the components that remain after the final event: that of a uniform target rank."""
        return self.target_rank * sum(costs.values())

    def is_prune_step(self, step: int) -> bool:
        """Whether an event takes place after optimizer step ``step``."""
        position = self._position(step)
        return step == self.final_step or (0 <= position < self._last and position % self.interval == 0)

    def in_warmup(self, step: int) -> bool:
        """Whether a step is before pruning may begin. Where t = 0 lasts two steps, the first of them is."""
        return step < self.total_steps * self.warmup_fraction

    def _check_ranks(self) -> None:
        if self.initial_rank < self.target_rank:
            raise ValueError(
                f"initial_rank is {self.initial_rank}, below target_rank {self.target_rank}: pruning only removes "
                "components, so raise initial_rank (the paper uses 1.5 x target_rank) or lower target_rank"
            )

    @property
    def _last(self) -> int:
        """``t_max``."""
        return _phase(self.total_steps, self.warmup_fraction, self.final_fraction)

    def _position(self, step: int) -> int:
        """``t`` of the schedule. ``int`` truncates towards zero as in the authors' code. t = 0 may therefore last two
        steps; no component is due for removal in either."""
        return int(step - self.total_steps * self.warmup_fraction)


@dataclass(frozen=True, slots=True)
class GrowthSchedule(BudgetSchedule):
    """The same steps, with a budget that rises linearly: every event allows the same number of new components (Zhang et
    al., 2023, IncreLoRA), except that the first one, at ``t = 0``, allows none.

    Args:
        initial_rank: components of each layer at the start, at least 1.
        target_rank: components of each layer, on average, after the final event; more than ``initial_rank``.

    Raises:
        ValueError: as in :class:`BudgetSchedule`, or not ``1 <= initial_rank < target_rank``.
    """

    def removed(self, step: int, removable: int) -> int:
        """Growth is negative removal. ``-removable`` units are added by the final event; the result is minus the number
        that an event at ``step`` allows, rounded down."""
        position = min(max(self._position(step), 0), self._last)
        return -(-removable * position // self._last)

    def _check_ranks(self) -> None:
        if not 1 <= self.initial_rank < self.target_rank:
            raise ValueError(
                f"initial_rank is {self.initial_rank} and target_rank {self.target_rank}, but growth must start "
                "at 1 or more and below target_rank: lower initial_rank or raise target_rank"
            )


class OneEvent(BudgetSchedule):
    """A schedule of which only the last event takes place."""

    def is_prune_step(self, step: int) -> bool:
        """Whether ``step`` is the step of the last event."""
        return step == self.final_step
