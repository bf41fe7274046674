"""The plan of a comparison: its cells, and the configuration of each cell's run."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dora_dist.compare.methods import ADALORA, EVA, PEER_TITLES, RANK_PER_BUDGET, Method
from dora_dist.compare.settings import NAME, CompareConfig
from dora_dist.config.checks import nearest
from dora_dist.config.parse import config_of
from dora_dist.config.presets import PAPER
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, EXACT_MATCH, LOSS, SEQUENCE_CLASSIFICATION, lower_is_better
from dora_dist.config.training import LORA_PLUS_RATIO

SEARCH = "search"
REPORTED = "reported"
"""Names of two held-out sources in a cell's run; a task's parts are further ones, under their own names."""
PEER_TASKS = {ADALORA: (CAUSAL_LM, SEQUENCE_CLASSIFICATION), EVA: (CAUSAL_LM,)}
"""Tasks on which a PEFT method can be trained and measured (:mod:`dora_dist.compare.peers`)."""
TASK_KEYS = ("search", "parts", "metric", "better")
OWNED = {
    "output_dir": "it is derived from the cell's names",
    "seed": "set seeds",
    "adapter.target_rank": "set budgets",
    "adapter.alpha": "set alpha_over_rank, which is the same for all methods",
    "training.learning_rate": "set learning_rates",
    "distributed": "a cell is one process; start several workers instead",
    "checkpoint.resume": "a cell resumes automatically",
    "evaluation.keep_best": "the last step is reported, and no split may choose what is reported on it",
    "evaluation.early_stopping": "all methods are trained for the same number of steps",
}
"""Keys of a run that the comparison sets, and what to do instead."""


@dataclass(frozen=True)
class Group:
    """A row of the table: cells that differ only in learning rate and seed."""

    task: str
    budget: int
    method: str

    def __str__(self) -> str:
        return f"{self.task} rank {self.budget} {self.method}"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    group: Group
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.group}, learning rate {self.learning_rate:g}, seed {self.seed}"


class Plan:
    """All cells of a comparison.

    Args:
        config: configuration of the comparison.

    Raises:
        ValueError: the configuration of a cell is invalid; names the cell.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.methods = config.built_methods()
        self.groups = [
            Group(task, budget, method) for task in config.tasks for budget in config.budgets for method in self.methods
        ]
        self._templates = {group: self._template(group) for group in self.groups}
        for task, entries in config.tasks.items():
            self._check_task(task, entries)
        self._check_same_data()
        self._check_distinct()

    @property
    def num_cells(self) -> int:
        """Total number of cells that will have run in the end."""
        searched, seeds = self.config.search_seeds, len(self.config.seeds)
        return len(self.groups) * (len(self.config.learning_rates) * searched + seeds - searched)

    def method(self, group: Group) -> Method:
        """The group's method."""
        return self.methods[group.method]

    def search_cells(self, group: Group) -> list[Cell]:
        """Cells by which the learning rate is chosen."""
        seeds = self.config.seeds[: self.config.search_seeds]
        return [Cell(group, rate, seed) for rate in self.config.learning_rates for seed in seeds]

    def reported_cells(self, group: Group, learning_rate: float) -> list[Cell]:
        """Cells that are reported at the chosen rate; those of the search seeds are also search cells."""
        return [Cell(group, learning_rate, seed) for seed in self.config.seeds]

    def possible_cells(self) -> Iterator[Cell]:
        """Every cell that could exist, whatever rate is chosen."""
        for group in self.groups:
            for rate in self.config.learning_rates:
                yield from self.reported_cells(group, rate)

    def cell_folder(self, cell: Cell) -> Path:
        """Folder of the cell's run."""
        group = cell.group
        parts = (group.task, f"rank{group.budget}", group.method, f"lr{cell.learning_rate:g}", f"seed{cell.seed}")
        return self.folder.joinpath("cells", *parts)

    def lock_file(self, cell: Cell) -> Path:
        """File that a worker locks while it runs the cell."""
        name = "_".join(self.cell_folder(cell).relative_to(self.folder / "cells").parts)
        return self.folder / "locks" / f"{name}.lock"

    def metric(self, task: str) -> str:
        """The held-out figure that is compared."""
        return str(self.config.tasks[task].get("metric", LOSS))

    def parts(self, task: str) -> tuple[str, ...]:
        """Names of the task's held-out sources whose figure is shown beside the compared one."""
        return tuple(self.config.tasks[task].get("parts", ()))

    def lower_is_better(self, task: str) -> bool:
        """Whether lower is better for the task's figure."""
        default = "lower" if lower_is_better(self.metric(task)) else "higher"
        return bool(self.config.tasks[task].get("better", default) == "lower")

    def run_config(self, cell: Cell) -> RunConfig:
        """The configuration of the cell's run."""
        template = self._templates[cell.group]
        return dataclasses.replace(
            template,
            output_dir=str(self.cell_folder(cell)),
            seed=cell.seed,
            training={**template.training, "learning_rate": cell.learning_rate},
        )

    def _check_task(self, task: str, entries: Mapping[str, Any]) -> None:
        if entries.get("better", "lower") not in ("lower", "higher"):
            raise ValueError(f"tasks.{task}.better is {entries['better']!r}, but must be lower or higher")
        template = self._templates[next(group for group in self.groups if group.task == task)]
        metric, measured = self.metric(task), (LOSS, *template.measured)
        if metric not in measured:
            of_texts = metric == EXACT_MATCH and template.task == CAUSAL_LM
            advice = "set evaluation.exact_match to true" if of_texts else "put it into evaluation.metrics"
            raise ValueError(
                f"tasks.{task}.metric is {metric}, which is not measured: {advice}, or choose one of "
                f"{', '.join(measured)}"
            )

    def _check_same_data(self) -> None:
        """Check that all methods are trained on the same rows. The records are checked again later, but cells are too
        expensive to find out only then."""
        baseline = next(group for group in self.groups if group.method == self.config.baseline)
        wanted = self._templates[baseline].pruning.num_held_back
        for group, template in self._templates.items():
            if template.pruning.num_held_back != wanted:
                raise ValueError(
                    f"cells {group}: pruning.importance {template.pruning.importance} holds back "
                    f"{template.pruning.num_held_back} training rows, but {self.config.baseline} holds back {wanted}, "
                    "so they would be trained on different data: choose another importance"
                )

    def _check_distinct(self) -> None:
        """Check that no method is another one by another name, which would be trained twice and counted in the
        adjustment of the p-values."""
        found: dict[Any, Group] = {}
        for group, template in self._templates.items():
            own = (template.adapter, template.pruning, template.training.get(LORA_PLUS_RATIO))
            key = repr((group.task, group.budget, self.method(group).peer, own))
            if key in found:
                raise ValueError(
                    f"methods {found[key].method} and {group.method} are the same beside run.preset {template.preset}, "
                    "which decides what a method does not set: remove one, or set another run.preset (the built-in "
                    f"ablations take parts out of preset {PAPER})"
                )
            found[key] = group

    def _template(self, group: Group) -> RunConfig:
        """Configuration of the group's cells, with the first seed and learning rate."""
        try:
            config = config_of(self._values(group))
            self._check_peer(group, config)
        except ValueError as error:
            raise ValueError(f"cells {group}: {error}") from None
        alpha = self.config.alpha_over_rank * config.adapter.full_rank
        return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, alpha=alpha))

    def _check_peer(self, group: Group, config: RunConfig) -> None:
        peer, start = self.method(group).peer, config.adapter.start_rank
        if peer is None:
            return
        title, tasks = PEER_TITLES[peer], PEER_TASKS[peer]
        if config.task not in tasks:
            known = " and ".join(tasks)
            raise ValueError(f"task is {config.task}, but {title} is compared on {known} only: remove it from methods")
        if config.adapter.start_from is not None:
            raise ValueError(
                f"adapter.start_from is {config.adapter.start_from}, but {title} makes a new adapter: remove it"
            )
        if config.adapter.new_tokens is not None:
            raise ValueError(
                f"adapter.new_tokens is {config.adapter.new_tokens}, but {title} trains LoRA factors only: remove it"
            )
        if LORA_PLUS_RATIO in config.training:
            raise ValueError(f"training.{LORA_PLUS_RATIO} is set, but {title} does not support it: remove it")
        if peer == ADALORA and start == group.budget:
            raise ValueError(f"adapter.initial_rank is {start}, the budget, so AdaLoRA has nothing to prune: raise it")

    def _target_rank(self, group: Group) -> int:
        factor = self.method(group).rank_per_budget
        rank = group.budget * factor
        if abs(rank - round(rank)) > 1e-6 or round(rank) < 1:
            raise ValueError(
                f"{RANK_PER_BUDGET} is {factor:g}, which gives the target rank {rank:g} for budget {group.budget}, "
                "but a rank is a whole number: change budgets or the factor"
            )
        return round(rank)

    def _values(self, group: Group) -> dict[str, Any]:
        config, method = self.config, self.method(group)
        task = config.tasks[group.task]
        _refuse_owned(config.run, "run")
        overrides = {key: value for key, value in task.items() if key not in TASK_KEYS}
        _refuse_owned(overrides, f"tasks.{group.task}")
        for key in overrides:
            if key not in _run_keys():
                known = (*_run_keys(), *TASK_KEYS)
                raise ValueError(f"unknown key tasks.{group.task}.{key}{nearest(key, known)}")
        _refuse_owned(method.sections, f"methods.{group.method}")
        values = _merged(config.run, overrides, method.sections)
        values["data"] = {**values.get("data", {}), "eval": _held_out(group.task, task, values.get("data", {}))}
        adapter = {**values.get("adapter", {}), "target_rank": self._target_rank(group)}
        adapter.setdefault("dtype", "auto")
        if method.uniform:
            adapter["initial_rank"] = adapter["target_rank"]
        values["adapter"] = adapter
        values["evaluation"] = {"before": False, **values.get("evaluation", {})}
        values["training"] = {
            "report_to": "none",
            **values.get("training", {}),
            "learning_rate": config.learning_rates[0],
        }
        values["distributed"] = {"engine": "none"}
        values["checkpoint"] = {"keep_last": 1, **values.get("checkpoint", {})}
        values["seed"] = config.seeds[0]
        values["output_dir"] = str(self.folder)
        return values


@cache
def _run_keys() -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(RunConfig))


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of later layers override keys of earlier ones; a key's value is replaced as a whole."""
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            former = values.get(key)
            if isinstance(former, Mapping) and isinstance(value, Mapping):
                values[key] = {**former, **value}
            else:
                values[key] = copy.deepcopy(value)
    return values


def _refuse_owned(values: Mapping[str, Any], where: str) -> None:
    for key, advice in OWNED.items():
        section, _, name = key.partition(".")
        found = values.get(section)
        if section in values and (not name or (isinstance(found, Mapping) and name in found)):
            raise ValueError(f"{where}.{key} is set by the comparison: {advice}")


def _held_out(task: str, entries: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The held-out sources, under the names by which their figures are found."""
    parts = entries.get("parts", {})
    if not isinstance(parts, Mapping):
        raise ValueError(f"tasks.{task}.parts is {parts!r}, but must be a mapping: a name for each held-out source")
    if taken := [name for name in (SEARCH, REPORTED) if name in parts]:
        raise ValueError(f"tasks.{task}.parts has {taken[0]}, which is the name of another split: choose another name")
    for name in parts:
        if not (isinstance(name, str) and NAME.fullmatch(name) and yaml.safe_load(name) == name):
            raise ValueError(
                f"tasks.{task}.parts has the name {name!r}, but a name must be letters, digits and any of ._+-, and "
                "nothing that YAML takes for a number, true, false or null (no and on are such): choose another name"
            )
    found = []
    for name, key, source in (
        (SEARCH, f"tasks.{task}.search", entries.get("search")),
        (REPORTED, f"tasks.{task}.data.eval", data.get("eval")),
        *((name, f"tasks.{task}.parts.{name}", source) for name, source in parts.items()),
    ):
        if source is None:
            rule = (
                "a part needs a held-out source"
                if name in parts
                else "a task needs data.eval, the reported split, and search, another split for choosing learning rates"
            )
            raise ValueError(f"{key} is missing: {rule}")
        source = source[0] if isinstance(source, list) and len(source) == 1 else source
        if isinstance(source, list):
            raise ValueError(f"{key} has {len(source)} sources, but must be one, whose path may be a list of files")
        found.append({**({"path": source} if isinstance(source, str) else source), "name": name})
    if {**found[0], "name": ""} == {**found[1], "name": ""}:
        raise ValueError(
            f"tasks.{task}: search and data.eval are the same source, so learning rates would be chosen on reported "
            "examples: use two separate splits"
        )
    return found
