"""What a run that resumes must have in common with the one it continues."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from dora_dist.base_model import load
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import TASKS
from dora_dist.data.plan import TrainingPlan
from dora_dist.setup.run_data import RunData
from dora_dist.training.batch_size import global_batch

METHOD_ARGUMENTS = (
    "learning_rate",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
)
"""Trainer settings that a resumed run must not change."""


def fingerprint(config: RunConfig, arguments: TrainingArguments, data: RunData, plan: TrainingPlan) -> dict[str, Any]:
    """What all ranks of a run have in common, and a run with the one whose checkpoint it continues."""
    adapter = {f"adapter.{name}": value for name, value in dataclasses.asdict(config.adapter).items()}
    pruning = {f"pruning.{name}": value for name, value in dataclasses.asdict(config.pruning).items()}
    adapter["adapter.seed"] = adapter_seed(config)
    training = {f"training.{name}": _plain(getattr(arguments, name)) for name in METHOD_ARGUMENTS}
    return {
        **adapter,
        **pruning,
        **training,
        **_labels(config, data),
        "task": config.task,
        "initial rank": config.adapter.start_rank,
        "model.path": config.model.path,
        "model.quantization": config.model.quantization,
        "model.compute_dtype": str(load.resolve_compute_dtype(config.model.compute_dtype)),
        "seed": config.seed,
        "optimizer steps": arguments.max_steps,
        "global batch": global_batch(arguments),
        **{f"examples of {source.name}": f"{source.counts.examples}, {source.digest[:16]}" for source in data.train},
        "data.batching": config.data.batching,
        "data order": plan.digest()[:16],
        "distributed.engine": config.distributed.engine,
    }


def _labels(config: RunConfig, data: RunData) -> dict[str, Any]:
    """Which number stands for which label."""
    return {"labels": data.labels or config.data.labels} if TASKS[config.task].has_labels else {}


def adapter_seed(config: RunConfig) -> int:
    """Seed of the adapter's start: its own, or that of the run."""
    return config.seed if config.adapter.seed is None else config.adapter.seed


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
