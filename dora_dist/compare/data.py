"""Reads and checks a comparison's data before any cell runs, and records their digests beside the cells."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dora_dist.compare.cell_result import check_identity, identity_of
from dora_dist.compare.plan import REPORTED, SEARCH, Plan
from dora_dist.console.files import read_json, write_json
from dora_dist.distributed import world
from dora_dist.setup import resolve, run_data

DATA = "data.json"
MOST_SHARED = 0.05
"""Largest share of search examples that may also be reported ones, because natural data contain some duplicates."""


@dataclass(frozen=True)
class TaskData:
    """What the comparison needs from a task's data.

    Attributes:
        digests: source -> digest of its examples; a held-out source is marked where a training source has its name.
        notes: remarks for the table.
    """

    digests: dict[str, str]
    notes: list[str]


def prepare(plan: Plan) -> dict[str, TaskData]:
    """Read or find the data of all tasks, and check every group's targets, phases and budget on its model's structure.

    Raises:
        ValueError: the configuration cannot work, or differs from what is on disk.
    """
    world.connect("none", 1)  # TrainingArguments needs it
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
    """Check that the cells on disk belong to this configuration, and to the data of the time when they ran.

    Returns:
        Notes on the data.

    Raises:
        ValueError: the cells belong to another configuration or other data, or there are no cells.
    """
    if not (plan.folder / DATA).is_file():
        raise ValueError(f"{plan.folder} holds no comparison: start one without --report")
    data = {
        task: TaskData(**entry) for task, entry in read_json(plan.folder / DATA).items() if task in plan.config.tasks
    }
    if missing := [task for task in plan.config.tasks if task not in data]:
        raise ValueError(f"{plan.folder} has no cell of the task {missing[0]}: start the comparison without --report")
    _check_identities(plan, data)
    return [note for task in plan.config.tasks for note in data[task].notes]


def _check_identities(plan: Plan, data: Mapping[str, TaskData]) -> None:
    for cell in plan.possible_cells():
        check_identity(plan, cell, identity_of(plan, cell, data[cell.group.task].digests))


def _task_data(task: str, data: run_data.RunData) -> TaskData:
    sources = {source.name: source for source in data.evaluation}
    examples = {name: source.counts.examples for name, source in sources.items()}
    search, notes = sources.pop(SEARCH), []
    for name, source in sources.items():
        shared = int(np.isin(search.keys(), source.keys()).sum())
        if shared > MOST_SHARED * search.counts.examples:
            where = "data.eval" if name == REPORTED else f"parts.{name}"
            raise ValueError(
                f"tasks.{task}: {shared} of {search.counts.examples} examples of search are also in {where}, so "
                "learning rates would be chosen on reported examples: use two separate splits"
            )
        notes += [f"{shared} examples of the search split are also {name} ones"] if shared else []
    notes += [
        f"{count} of {examples[name]} examples of {name} are also trained on"
        for name, count in data.overlap.items()
        if count
    ]
    digests = {source.name: source.digest for source in data.train}
    for source in data.evaluation:  # a training source may have the same name
        digests[f"{source.name} (held out)" if source.name in digests else source.name] = source.digest
    return TaskData(digests, [f"{task}: {note}" for note in notes])
