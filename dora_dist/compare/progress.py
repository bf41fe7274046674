"""Which cells of a comparison are finished, have failed, or are still needed."""

from collections.abc import Iterator

from dora_dist.compare.cell_result import CellResult, read_result
from dora_dist.compare.plan import Cell, Group, Plan
from dora_dist.evaluation.seeds import RateChoice, choose
from dora_dist.runs.records import read_failure


class Progress:
    """The state of the cells so far, read from their folders.

    Args:
        plan: The comparison.
        since: Time (seconds since the epoch) from which on a failure counts; cells that failed earlier are run again.
    """

    def __init__(self, plan: Plan, since: float = 0.0) -> None:
        self.plan = plan
        self._since = since
        self._results: dict[Cell, CellResult] = {}

    def result(self, cell: Cell) -> CellResult | None:
        """The result of a finished cell, else None."""
        if cell not in self._results and (found := read_result(self.plan, cell)) is not None:
            self._results[cell] = found
        return self._results.get(cell)

    def failure(self, cell: Cell) -> str | None:
        """Why the cell failed, or None."""
        failure = read_failure(self.plan.cell_folder(cell))
        return failure["error"] if failure is not None and failure["when"] >= self._since else None

    def choice(self, group: Group) -> RateChoice | None:
        """The group's learning rate once all its search cells are finished; None before, or if all diverged."""
        figures: dict[float, list[float]] = {rate: [] for rate in self.plan.config.learning_rates}
        for cell in self.plan.search_cells(group):
            result = self.result(cell)
            if result is None:
                return None
            figures[cell.learning_rate].append(result.search)
        return choose(figures, self.plan.lower_is_better(group.task))

    def known_cells(self) -> Iterator[Cell]:
        """Cells that are certain to be needed, group by group, which completes the table row by row: first the search
        cells, then those at the chosen rate."""
        for group in self.plan.groups:
            yield from self.plan.search_cells(group)
            if (choice := self.choice(group)) is not None:
                searched = set(self.plan.search_cells(group))
                reported = self.plan.reported_cells(group, choice.learning_rate)
                yield from (cell for cell in reported if cell not in searched)

    def open_cells(self) -> list[Cell]:
        """Needed cells that have neither finished nor failed."""
        return [cell for cell in self.known_cells() if self.result(cell) is None and self.failure(cell) is None]

    def finished(self) -> int:
        """Number of finished cells."""
        return sum(self.result(cell) is not None for cell in self.known_cells())
