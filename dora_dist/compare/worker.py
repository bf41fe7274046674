"""Works through the cells, together with any number of other workers on the same folder.

A worker claims a cell by a lock that ends with its process, however that ends. Any worker may run a cell that is
neither finished nor locked, and resumes it where it stopped.
"""

import time
from collections.abc import Iterator, Mapping

import torch
from filelock import FileLock, Timeout

from dora_dist.compare.cell import run_cell
from dora_dist.compare.cell_result import CellResult, identity_of, read_result
from dora_dist.compare.data import TaskData
from dora_dist.compare.plan import Cell, Group, Plan
from dora_dist.console.provenance import COMPARE_PACKAGES, environment
from dora_dist.evaluation.seeds import RateChoice, choose
from dora_dist.runs.records import read_failure

POLL_SECONDS = 1.0


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


class Worker:
    """A process that runs cells.

    Args:
        plan: The comparison.
        data: Task -> its data.
        workers: Number of processes that share the cells, for the estimate of remaining time.
    """

    def __init__(self, plan: Plan, data: Mapping[str, TaskData], workers: int) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self._plan = plan
        self._data = data
        self._workers = workers
        self._progress = Progress(plan, since=time.time())
        self._environment = {**environment(COMPARE_PACKAGES), "gpu": gpu}
        self._seconds: list[float] = []

    def work(self) -> None:
        """Run cells until no cell is left to run.

        Raises:
            PreemptedError: The process received a signal to stop.
        """
        (self._plan.folder / "locks").mkdir(parents=True, exist_ok=True)
        while open_cells := self._progress.open_cells():
            if not any(self._run_if_free(cell) for cell in open_cells):
                time.sleep(POLL_SECONDS)  # other workers run them all; when these end, new cells may be known

    def _run_if_free(self, cell: Cell) -> bool:
        """Run the cell if no other worker does. Returns whether it was free."""
        try:
            with FileLock(self._plan.lock_file(cell), timeout=0):
                if self._progress.result(cell) is not None or self._progress.failure(cell) is not None:
                    return True  # another worker has finished it in the meantime
                began = time.monotonic()
                identity = identity_of(self._plan, cell, self._data[cell.group.task].digests)
                reason = run_cell(self._plan, cell, identity, self._environment)
                self._seconds.append(time.monotonic() - began)
        except Timeout:
            return False
        print(self._line(cell, reason), flush=True)
        return True

    def _line(self, cell: Cell, reason: str | None) -> str:
        """The cell's line for the terminal; ``reason`` is its failure, or None."""
        done, total = self._progress.finished(), self._plan.num_cells
        result = self._progress.result(cell)
        if reason is not None:
            what = f"{'diverged' if result is not None else 'FAILED'}: {reason.splitlines()[0]}"
        else:
            assert result is not None, "a cell that has not failed is finished"
            metric = self._plan.metric(cell.group.task)
            what = f"{metric} {result.search:.4f} (search) {result.reported:.4f} (reported)"
        left = sum(self._seconds) / len(self._seconds) * (total - done) / self._workers
        return f"[{done}/{total}] {cell}: {self._seconds[-1]:.0f} s, {what}; about {left / 60:.0f} min left"
