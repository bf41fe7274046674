"""The budget of a run: what a model's components may cost, counted in components or in parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dora_dist.method.allocation import select_within_budget
from dora_dist.method.schedule import Schedule

COMPONENTS, PARAMETERS = "components", "parameters"


@dataclass(frozen=True)
class Budget:
    """A schedule and the cost of each layer's components.

    Counted in parameters, a component of a wide layer costs more than one of a narrow layer. The kept components then
    cost as much as those of a uniform adapter of the target rank, to within one component.

    Args:
        schedule: schedule of the budget over the run.
        costs: layer name -> cost of one component of the layer.
    """

    schedule: Schedule
    costs: Mapping[str, int]

    @property
    def initial(self) -> int:
        """Cost of all components at the start."""
        return self.schedule.cost_at_start(self.costs)

    @property
    def final(self) -> int:
        """Largest total cost of the components that remain after the last event."""
        return self.schedule.cost_at_end(self.costs)

    def at(self, step: int) -> int:
        """Largest total cost of the components that an event at ``step`` keeps."""
        return self.initial - self.schedule.removed(step, self.initial - self.final)

    def spent(self, ranks: Mapping[str, int]) -> int:
        """Total cost of these ranks (layer name -> number of components)."""
        return sum(self.costs[name] * rank for name, rank in ranks.items())

    def is_met_by(self, ranks: Mapping[str, int]) -> bool:
        """Whether these ranks spend the final budget: at most the budget, with less than the cost of one component left
        over."""
        return 0 <= self.final - self.spent(ranks) < max(self.costs.values())

    def select(
        self,
        scores: Mapping[str, Tensor],
        step: int,
        min_rank: int = 0,
        max_rank: int | None = None,
        eligible: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Components that an event at ``step`` keeps; see :func:`~dora_dist.method.allocation.select_within_budget`."""
        return select_within_budget(scores, self.costs, self.at(step), min_rank, max_rank, eligible)


def component_costs(shapes: Mapping[str, tuple[int, int]], unit: str) -> dict[str, int]:
    """Cost of one component of each layer.

    Args:
        shapes: layer name -> (inputs, outputs).
        unit: ``components`` (1 each) or ``parameters`` (inputs plus outputs; the gate is free, as it is folded away).

    Raises:
        ValueError: the unit is neither of these.
    """
    if unit not in (COMPONENTS, PARAMETERS):
        raise ValueError(f"budget_unit is {unit!r}, but must be {COMPONENTS} or {PARAMETERS}")
    return {name: sum(shape) if unit == PARAMETERS else 1 for name, shape in shapes.items()}
