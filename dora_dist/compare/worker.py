"""Working through the cells, beside any number of other workers on the same folder.

A worker claims a cell by a lock that ends with its process, whatever ends that. A cell that is not finished and not
locked is anybody's, and goes on where it was.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from filelock import FileLock, Timeout

from dora_dist.compare.cell import run_cell
from dora_dist.compare.outcome import CellResult, check_identity, identity_of, read_failure, read_outcome
from dora_dist.compare.plan import REPORTED, SEARCH, Cell, Group, Plan
from dora_dist.console.files import read_json, write_json
from dora_dist.console.provenance import COMPARE_PACKAGES, environment
from dora_dist.distributed import world
from dora_dist.evaluation.seeds import RateChoice, choose
from dora_dist.setup import resolve, run_data

DATA = "data.json"
POLL_SECONDS = 1.0
MOST_SHARED = 0.05
"""Share of the search split's examples that may also be reported ones: natural data repeat themselves a little."""


@dataclass(frozen=True)
class TaskData:
    """What the comparison must know of a task's data.

    Attributes:
        digests: source -> digest of its examples.
        notes: for the table.
    """

    digests: dict[str, str]
    notes: list[str]


def prepare(plan: Plan) -> dict[str, TaskData]:
    """Read or find the data of all tasks, and try every group's targets, phases and budget on its model's structure.

    Raises:
        ValueError: something cannot work, or what is on disk was made otherwise.
    """
    world.connect("none", 1)  # which TrainingArguments wants to find
    found: dict[str, TaskData] = {}
    for task in plan.config.tasks:
        groups = [group for group in plan.groups if group.task == task]
        configs = [plan.run_config(plan.search_cells(group)[0]) for group in groups]
        tokenizer, data = run_data.read_data(configs[0])
        for group, config in zip(groups, configs, strict=True):
            try:
                resolve.resolve_run(config, tokenizer, data)
            except ValueError as error:
                raise ValueError(f"cells {group}: {error}") from None
        found[task] = _task_data(task, data)
    _check_identities(plan, found)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / DATA, {task: dataclasses.asdict(data) for task, data in found.items()})
    return found


def check_recorded(plan: Plan) -> list[str]:
    """Check that the cells on disk are those of this configuration, with the data that were there when they were run.

    Returns:
        Notes on the data.

    Raises:
        ValueError: they are not, or nothing has been run.
    """
    if not (plan.folder / DATA).is_file():
        raise ValueError(f"{plan.folder} holds no comparison: start one without --report")
    data = {
        task: TaskData(**entry) for task, entry in read_json(plan.folder / DATA).items() if task in plan.config.tasks
    }
    if missing := [task for task in plan.config.tasks if task not in data]:
        raise ValueError(f"{plan.folder} has nothing of the task {missing[0]}: start the comparison without --report")
    _check_identities(plan, data)
    return [note for task in plan.config.tasks for note in data[task].notes]


def _check_identities(plan: Plan, data: Mapping[str, TaskData]) -> None:
    for cell in plan.possible_cells():
        check_identity(plan, cell, identity_of(plan, cell, data[cell.group.task].digests))


def _task_data(task: str, data: run_data.RunData) -> TaskData:
    sources = {source.name: source for source in data.evaluation}
    search, reported = sources[SEARCH], sources[REPORTED]
    shared = int(np.isin(search.keys(), reported.keys()).sum())
    if shared > MOST_SHARED * search.counts.examples:
        raise ValueError(
            f"tasks.{task}: {shared} of {search.counts.examples} examples of search are also in data.eval, so that "
            "learning rates would be chosen on what is reported: give two splits"
        )
    notes = [f"{shared} examples of the search split are also reported ones"] if shared else []
    notes += [
        f"{count} of {sources[name].counts.examples} examples of {name} are also trained on"
        for name, count in data.overlap.items()
        if count
    ]
    digests = {source.name: source.digest for source in (*data.train, *data.evaluation)}
    return TaskData(digests, [f"{task}: {note}" for note in notes])


class Progress:
    """What has become of the cells so far, as the folders show it.

    Args:
        plan: of the comparison.
        since: clock from which on a failure counts; a cell that failed earlier is tried again.
    """

    def __init__(self, plan: Plan, since: float = 0.0) -> None:
        self.plan = plan
        self._since = since
        self._outcomes: dict[Cell, CellResult] = {}

    def outcome(self, cell: Cell) -> CellResult | None:
        """Of a finished cell, else None."""
        if cell not in self._outcomes and (found := read_outcome(self.plan, cell)) is not None:
            self._outcomes[cell] = found
        return self._outcomes.get(cell)

    def failure(self, cell: Cell) -> str | None:
        """Why the cell has failed, if it has."""
        failure = read_failure(self.plan.cell_folder(cell))
        return failure["error"] if failure is not None and failure["when"] >= self._since else None

    def choice(self, group: Group) -> RateChoice | None:
        """The group's learning rate, once all its search cells are finished; None before, or where all diverged."""
        figures: dict[float, list[float]] = {rate: [] for rate in self.plan.config.learning_rates}
        for cell in self.plan.search_cells(group):
            outcome = self.outcome(cell)
            if outcome is None:
                return None
            figures[cell.learning_rate].append(outcome.search)
        return choose(figures, self.plan.lower_is_better(group.task))

    def known_cells(self) -> Iterator[Cell]:
        """Cells of which it is certain that they are to be run, group by group, so that rows of the table are completed
        one after another: those of the search, then those at the chosen rate."""
        for group in self.plan.groups:
            yield from self.plan.search_cells(group)
            if (choice := self.choice(group)) is not None:
                searched = set(self.plan.search_cells(group))
                reported = self.plan.reported_cells(group, choice.learning_rate)
                yield from (cell for cell in reported if cell not in searched)

    def open_cells(self) -> list[Cell]:
        """Cells to run that have neither been finished nor failed."""
        return [cell for cell in self.known_cells() if self.outcome(cell) is None and self.failure(cell) is None]

    def finished(self) -> int:
        """Number of finished cells."""
        return sum(self.outcome(cell) is not None for cell in self.known_cells())


def work(plan: Plan, data: Mapping[str, TaskData], workers: int) -> None:
    """Run cells until none is left that could be run.

    Args:
        plan: of the comparison.
        data: of its tasks.
        workers: how many share the work, for the time that is left.

    Raises:
        PreemptedError: the process was told to stop.
    """
    progress = Progress(plan, since=time.time())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    around = {**environment(COMPARE_PACKAGES), "gpu": gpu}
    seconds: list[float] = []
    (plan.folder / "locks").mkdir(parents=True, exist_ok=True)
    while open_cells := progress.open_cells():
        if not any(_try(plan, cell, progress, data, around, workers, seconds) for cell in open_cells):
            time.sleep(POLL_SECONDS)  # all are others', whose ends may open new ones


def _try(
    plan: Plan,
    cell: Cell,
    progress: Progress,
    data: Mapping[str, TaskData],
    around: dict[str, object],
    workers: int,
    seconds: list[float],
) -> bool:
    """Run the cell if nobody else does; whether it was free."""
    try:
        with FileLock(plan.lock_file(cell), timeout=0):
            if progress.outcome(cell) is not None or progress.failure(cell) is not None:
                return True  # another has ended it since we looked
            began = time.monotonic()
            reason = run_cell(plan, cell, identity_of(plan, cell, data[cell.group.task].digests), around)
            seconds.append(time.monotonic() - began)
    except Timeout:
        return False
    print(_line(plan, cell, progress, reason, seconds, workers), flush=True)
    return True


def _line(
    plan: Plan, cell: Cell, progress: Progress, reason: str | None, seconds: Sequence[float], workers: int
) -> str:
    done, total = progress.finished(), plan.num_cells
    outcome = progress.outcome(cell)
    if reason is not None:
        what = f"{'diverged' if outcome is not None else 'FAILED'}: {reason.splitlines()[0]}"
    else:
        assert outcome is not None, "a cell that has not failed is finished"
        what = f"{plan.metric(cell.group.task)} {outcome.search:.4f} (search) {outcome.reported:.4f} (reported)"
    left = sum(seconds) / len(seconds) * (total - done) / workers
    return f"[{done}/{total}] {cell}: {seconds[-1]:.0f} s, {what}; about {left / 60:.0f} min left"
