"""Works through the cells, together with any number of other workers on the same folder.

A worker claims a cell by a lock that ends with its process, however that ends. Any worker may run a cell that is
neither finished nor locked, and resumes it where it stopped.
"""

import time
from collections.abc import Mapping

import torch
from filelock import FileLock, Timeout

from dora_dist.compare.cell import run_cell
from dora_dist.compare.cell_result import identity_of
from dora_dist.compare.data import TaskData
from dora_dist.compare.plan import Cell, Plan
from dora_dist.compare.progress import Progress
from dora_dist.console.provenance import COMPARE_PACKAGES, environment

POLL_SECONDS = 1.0


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
