"""Gathers the results of a comparison from its cells' folders alone: ``results.json``."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dora_dist.compare.cell_result import CellResult, training_settings
from dora_dist.compare.plan import Group, Plan
from dora_dist.compare.progress import Progress
from dora_dist.compare.settings import CompareConfig
from dora_dist.console import files
from dora_dist.evaluation.seeds import CONFIDENCE, PairedDifference, RateChoice, holm, paired_difference, spread

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A held-out figure of a group's cells.

    Attributes:
        reported: Seed -> value on the split.
        mean: Mean of the values.
        deviation: Their sample standard deviation; None with fewer than two.
        difference: Difference from the baseline, paired by seed; None for the baseline itself.
    """

    reported: Mapping[int, float]
    mean: float | None
    deviation: float | None
    difference: PairedDifference | None


@dataclass(frozen=True, kw_only=True)
class GroupResult(Figure):
    """A row of the table: the combined results of a group's cells, with the figure on the reported split.

    Attributes:
        task: Name of the task.
        budget: Target rank.
        method: Name of the method.
        metric: Name of the metric that is compared.
        lower_is_better: Whether lower values of the metric are better.
        learning_rate: The chosen rate; None before the choice, or if every rate has diverged.
        search: Learning rate -> mean on the search split; None if a run diverged.
        at_edge: ``lowest`` or ``highest`` if the chosen rate is at that edge of the grid, else None.
        searched: Whether there was more than one rate to choose from.
        parts: Name of a part of the task -> the figure on it.
        p_holm: The difference's p-value, adjusted for all comparisons of the table; None without a p-value.
        parameters: Mean number of elements in the saved LoRA factors that a prompt uses.
        stored: Mean number of all elements in the saved LoRA factors.
        parameters_of_baseline: ``parameters`` of the baseline.
        parameters_differ: Whether the two differ by more than one component of the widest layer.
        seconds: Mean seconds of training.
        steps: Optimizer steps.
        initial_rank: Components of a layer at the start.
        mean_ranks: Layer -> mean number of components that are kept.
        missing: What is missing for this row, in words.
    """

    task: str
    budget: int
    method: str
    metric: str
    lower_is_better: bool
    learning_rate: float | None
    search: Mapping[str, float | None] | None
    at_edge: str | None
    searched: bool
    parts: Mapping[str, Figure]
    parameters: float | None
    stored: float | None
    parameters_of_baseline: float | None
    parameters_differ: bool
    seconds: float | None
    steps: int | None
    initial_rank: int | None
    mean_ranks: Mapping[str, float]
    missing: Sequence[str]
    p_holm: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as ``results.json`` holds it: ``p_holm`` is part of the difference."""
        values = dataclasses.asdict(self)
        p_holm = values.pop("p_holm")
        if p_holm is not None:
            values["difference"]["p_holm"] = p_holm
        return values


@dataclass(frozen=True, kw_only=True)
class ComparisonResults:
    """The results of a comparison.

    Attributes:
        command: The command that makes this comparison.
        written: Time at which the results were gathered.
        began: Time at which the first cell began; None without any cell.
        commits: Commits of the sources that ran the cells.
        dirty: Whether a cell was run from uncommitted sources.
        config: The configuration of the comparison.
        methods: Method -> description.
        confidence: Level of the confidence intervals.
        comparisons: Number of differences from a baseline.
        notes: Notes on the data.
        complete: Whether all cells of all rows are finished.
        groups: Rows of the table.
        cells: The cells, as ``results.json`` holds them.
    """

    command: str
    written: str
    began: str | None
    commits: Sequence[str]
    dirty: bool
    config: CompareConfig
    methods: Mapping[str, str]
    confidence: float
    comparisons: int
    notes: Sequence[str]
    complete: bool
    groups: Sequence[GroupResult]
    cells: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {**dataclasses.asdict(self), "groups": [group.as_dict() for group in self.groups]}

    def by_task_and_budget(self) -> list[list[GroupResult]]:
        """Groups of rows that are compared with each other, in the order of the table."""
        panels: dict[tuple[str, int], list[GroupResult]] = {}
        for group in self.groups:
            panels.setdefault((group.task, group.budget), []).append(group)
        return list(panels.values())


def gather(plan: Plan, notes: Sequence[str], command: str) -> ComparisonResults:
    """Read the results of all cells.

    Args:
        plan: The comparison.
        notes: Notes on the data, for the table.
        command: The command that makes this comparison.

    Raises:
        ValueError: Compared cells were run under different conditions.
    """
    progress = Progress(plan)
    choices = {group: progress.choice(group) for group in plan.groups}
    reported = {group: _reported(plan, progress, group, choices[group]) for group in plan.groups}
    _check_same_conditions(reported)
    groups = _with_adjusted_p_values(
        [_group_result(plan, progress, group, choices[group], reported) for group in plan.groups]
    )
    cells = list(_cells(plan, progress))
    environments = [cell["environment"] for cell in cells if cell["environment"]]
    return ComparisonResults(
        command=command,
        written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        began=min((environment["began"] for environment in environments), default=None),
        commits=sorted({str(environment["commit"]) for environment in environments}),
        dirty=any(environment["dirty"] for environment in environments),
        config=plan.config,
        methods={name: method.says for name, method in plan.methods.items()},
        confidence=CONFIDENCE,
        comparisons=sum(group.difference is not None and group.difference.mean is not None for group in groups),
        notes=list(notes),
        complete=not any(group.missing for group in groups),
        groups=groups,
        cells=cells,
    )


def write_results(results: ComparisonResults, path: Path) -> None:
    """Write the results as JSON."""
    files.write_json(path, results.as_dict())


def _reported(plan: Plan, progress: Progress, group: Group, choice: RateChoice | None) -> dict[int, CellResult]:
    """Seed -> result, for the group's reported cells that are finished and have not diverged."""
    if choice is None:
        return {}
    found = {cell.seed: progress.result(cell) for cell in plan.reported_cells(group, choice.learning_rate)}
    return {seed: result for seed, result in found.items() if result is not None and not result.diverged}


def _check_same_conditions(reported: Mapping[Group, Mapping[int, CellResult]]) -> None:
    """Check that methods were compared on one base, with the same data in the same order, and the same number of steps.

    Raises:
        ValueError: Two methods differ in one of these.
    """
    first: dict[tuple[str, int], tuple[Group, Mapping[str, Any]]] = {}
    for group, results in reported.items():
        for seed, result in results.items():
            settings = training_settings(result.settings)
            other, expected = first.setdefault((group.task, seed), (group, settings))
            for name in expected.keys() & settings.keys():
                if settings[name] != expected[name]:
                    raise ValueError(
                        f"seed {seed}: {name} is {settings[name]!r} in cells {group} and {expected[name]!r} in "
                        f"cells {other}, but must be the same: delete the cells that are wrong, and start again"
                    )


def _group_result(
    plan: Plan,
    progress: Progress,
    group: Group,
    choice: RateChoice | None,
    reported: Mapping[Group, Mapping[int, CellResult]],
) -> GroupResult:
    baseline = dataclasses.replace(group, method=plan.config.baseline)
    own, base = reported[group], reported[baseline]
    compared_with = None if group == baseline else base
    return GroupResult(
        task=group.task,
        budget=group.budget,
        method=group.method,
        metric=plan.metric(group.task),
        lower_is_better=plan.lower_is_better(group.task),
        learning_rate=None if choice is None else choice.learning_rate,
        search=None if choice is None else {f"{rate:g}": _finite(mean) for rate, mean in choice.means.items()},
        at_edge=None if choice is None else choice.at_edge,
        searched=choice is not None and choice.searched,
        **vars(_figure(own, compared_with)),
        parts={part: _figure(own, compared_with, part) for part in plan.parts(group.task)},
        parameters=_mean(result.parameters for result in own.values()),
        stored=_mean(result.stored for result in own.values()),
        parameters_of_baseline=_mean(result.parameters for result in base.values()),
        parameters_differ=_parameters_differ(own, base),
        seconds=_mean(result.seconds for result in own.values()),
        steps=max((result.steps for result in own.values()), default=None),
        initial_rank=max((result.initial_rank for result in own.values()), default=None),
        mean_ranks=_mean_ranks([result.ranks for result in own.values()]),
        missing=list(_missing(plan, progress, group, choice)),
    )


def _figure(own: Mapping[int, CellResult], base: Mapping[int, CellResult] | None, part: str | None = None) -> Figure:
    """The figure on a part of the task, or on the reported split, and its difference from the baseline over the seeds
    that both have."""
    values = _values(own, part)
    found = spread(list(values.values()))
    difference = None
    if base is not None:
        other = _values(base, part)
        seeds = [seed for seed in values if seed in other]
        difference = paired_difference([values[seed] for seed in seeds], [other[seed] for seed in seeds])
    return Figure(reported=values, mean=found.mean, deviation=found.deviation, difference=difference)


def _values(results: Mapping[int, CellResult], part: str | None) -> dict[int, float]:
    return {seed: result.reported if part is None else result.parts[part] for seed, result in results.items()}


def _parameters_differ(own: Mapping[int, CellResult], base: Mapping[int, CellResult]) -> bool:
    """Whether the mean numbers of parameters differ by more than one component of the widest layer."""
    if not own or not base:
        return False
    found, wanted = (fmean(result.parameters for result in results.values()) for results in (own, base))
    return abs(found - wanted) > max(result.widest for result in base.values())


def _missing(plan: Plan, progress: Progress, group: Group, choice: RateChoice | None) -> Iterator[str]:
    """What is missing for the group's row, in words."""
    cells = plan.search_cells(group)
    if choice is not None:
        cells = plan.reported_cells(group, choice.learning_rate)
    lacking = False
    for cell in cells:
        result, failure = progress.result(cell), progress.failure(cell)
        if result is None or (choice is not None and result.diverged):
            lacking = True
            yield f"{cell}: {failure or 'not run yet'}"
    if choice is None and not lacking:
        yield f"{group}: every learning rate has diverged"


def _cells(plan: Plan, progress: Progress) -> Iterator[dict[str, Any]]:
    for cell in progress.known_cells():
        result, failure = progress.result(cell), progress.failure(cell)
        yield {
            "folder": str(plan.cell_folder(cell).relative_to(plan.folder)),
            "task": cell.group.task,
            "budget": cell.group.budget,
            "method": cell.group.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "search": None if result is None else _finite(result.search),
            "reported": None if result is None else _finite(result.reported),
            "parts": {} if result is None else {name: _finite(value) for name, value in result.parts.items()},
            "parameters": None if result is None else result.parameters,
            "stored": None if result is None else result.stored,
            "seconds": None if result is None else _finite(result.seconds),
            "ranks": None if result is None else result.ranks,
            "failure": failure,
            "environment": None if result is None else result.environment,
        }


def _with_adjusted_p_values(groups: Sequence[GroupResult]) -> list[GroupResult]:
    """The rows with their p-values adjusted for all comparisons of the table."""
    p_values = {
        number: group.difference.p_value
        for number, group in enumerate(groups)
        if group.difference is not None and group.difference.p_value is not None
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [dataclasses.replace(group, p_holm=adjusted.get(number)) for number, group in enumerate(groups)]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_ranks(ranks: Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {name: fmean(one.get(name, 0) for one in ranks) for name in (ranks[0] if ranks else {})}
