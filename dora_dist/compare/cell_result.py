"""Reads the result of a cell from its folder."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dora_dist.adapter.plain_lora import HEAD, TOKEN_ROWS, read_lora_adapter
from dora_dist.compare.methods import ADALORA, OF_TRAINING
from dora_dist.compare.plan import REPORTED, SEARCH, Cell, Plan
from dora_dist.config.data import DataConfig
from dora_dist.config.given import flatten
from dora_dist.config.model import ModelConfig
from dora_dist.config.run import RunConfig
from dora_dist.console import files
from dora_dist.routing.files import is_routed, read_routed_adapter
from dora_dist.runs import records
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.records import IDENTITY, read_failure
from dora_dist.runs.speed import TrainingTime
from dora_dist.runs.summary import is_finished

MAY_DIFFER = ("output_dir", "format_version", "data.cache_dir", "data.workers", "distributed", "checkpoint")
"""Keys of a cell's configuration that may change without changing its results."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of a finished cell.

    Attributes:
        search: figure on the split for choosing learning rates; NaN if training diverged.
        reported: figure on the reported split, at the last step; NaN if training diverged.
        parts: figure on each of the task's parts, at the last step.
        parameters: number of elements in the saved adapter's factors that a prompt uses. With routing, their mean if
            all modules of a block are chosen equally often.
        stored: number of elements in the saved adapter's factors, used by a prompt or not.
        widest: parameters of one component in the widest layer.
        ranks: number of components kept, by layer.
        initial_rank: number of components of a layer at the start.
        steps: number of optimizer steps.
        seconds: seconds of training, logging included.
        settings: settings that the run recorded.
        environment: environment in which the cell ran.
    """

    search: float
    reported: float
    parts: Mapping[str, float]
    parameters: float
    stored: int
    widest: int
    ranks: Mapping[str, int]
    initial_rank: int
    steps: int
    seconds: float
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether a figure of the cell is not finite."""
        return not (math.isfinite(self.search) and math.isfinite(self.reported))


def read_result(plan: Plan, cell: Cell) -> CellResult | None:
    """The measurements of a cell's run; None if it has not finished."""
    folder = plan.cell_folder(cell)
    failure = read_failure(folder)
    if failure is not None and failure["diverged"]:
        recorded = files.read_json(folder / IDENTITY)
        return CellResult(
            search=math.nan,
            reported=math.nan,
            parts={},
            parameters=0,
            stored=0,
            widest=0,
            ranks={},
            initial_rank=0,
            steps=0,
            seconds=math.nan,
            settings={},
            environment=recorded["environment"],
        )
    if not is_finished(folder):
        return None
    summary = files.read_json(folder / records.SUMMARY)
    task = cell.group.task
    metric, parts = plan.metric(task), plan.parts(task)
    figures = {name: float(summary["after"][f"{name}_{metric}"]) for name in (SEARCH, REPORTED, *parts)}
    stored, widest, share = adapter_size(folder / "adapter")
    return CellResult(
        search=figures[SEARCH],
        reported=figures[REPORTED],
        parts={name: figures[name] for name in parts},
        parameters=stored * share,
        stored=stored,
        widest=widest,
        ranks=summary["ranks"],
        initial_rank=summary["initial_rank"],
        steps=summary["steps"],
        seconds=_training_seconds(folder),
        settings=files.read_json(folder / records.RUN)["settings"],
        environment=files.read_json(folder / IDENTITY)["environment"],
    )


def _training_seconds(folder: Path) -> float:
    time = TrainingTime()
    for line in records.each_metric(folder):
        time.add(line)
    return time.seconds


def adapter_size(folder: Path) -> tuple[int, int, float]:
    """Three figures of a saved adapter: the number of elements in its LoRA factors, the number in one component of its
    widest layer, and the share of its modules that a prompt uses. Gates and singular values are folded in. Padding, a
    head and routers are not counted."""
    if is_routed(folder):
        routed = read_routed_adapter(folder)
        factors, share = routed.factors.values(), routed.modules_per_prompt / len(routed.blocks[0])
    else:
        factors, share = read_lora_adapter(folder, (HEAD, TOKEN_ROWS)).values(), 1.0
    stored = sum(lora_a.numel() + lora_b.numel() for lora_a, lora_b in factors)
    return stored, max(lora_a.shape[1] + lora_b.shape[0] for lora_a, lora_b in factors), share


def identity_of(plan: Plan, cell: Cell, data: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a cell's results depend on.

    Args:
        plan: plan of the comparison.
        cell: a cell of the plan.
        data: source -> digest of its examples.
    """
    method = plan.method(cell.group)
    own = plan.config.adalora.named() if method.peer == ADALORA else {}
    config = flatten(dataclasses.asdict(plan.run_config(cell)))
    return {
        **{name: value for name, value in config.items() if not _may_differ(name)},
        **own,
        **{f"examples of {name}": digest for name, digest in data.items()},
    }


def check_identity(plan: Plan, cell: Cell, identity: Mapping[str, Any]) -> None:
    """Refuse a folder whose results were made with other settings or data.

    Raises:
        ValueError: names the first difference.
    """
    folder = plan.cell_folder(cell)
    if not (folder / IDENTITY).is_file():
        return
    recorded = files.read_json(folder / IDENTITY)["identity"]
    identity = json.loads(json.dumps(identity))  # in the form in which it is recorded
    for name in {**recorded, **identity}:
        former = recorded.get(name, _defaults().get(name))  # a setting added later had its default value
        if former != identity.get(name):
            raise ValueError(
                f"{folder} was made with {name} {former!r}, but now it is {identity.get(name)!r}: choose "
                "another output_dir, or delete that folder to run the cell again"
            )


@cache
def _defaults() -> dict[str, Any]:
    least = RunConfig(output_dir="-", model=ModelConfig(path="-"), data=DataConfig(train="-"))
    defaults: dict[str, Any] = json.loads(json.dumps(flatten(dataclasses.asdict(least))))
    return defaults


def _may_differ(name: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in MAY_DIFFER)


def training_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's recorded settings that must be equal for methods to be compared."""
    run = Fingerprint.from_dict(settings, records.RUN)
    own = ("learning_rate", *OF_TRAINING)
    training = {name: value for name, value in run.training.items() if name not in own}
    common = dataclasses.replace(run, initial_rank=0, adapter={}, pruning={}, training=training, others={})
    return common.as_dict()
