"""The fingerprint of a run that is being set up."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from transformers import TrainingArguments

from dora_dist.base_model import load
from dora_dist.config.adapter import RANKS_FROM_DATA, UNIFORM
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import TASKS
from dora_dist.config.training import LORA_PLUS_RATIO, training_argument
from dora_dist.data.plan import TrainingPlan
from dora_dist.data.prepared import PreparedSource
from dora_dist.method.schedule import BudgetSchedule, Schedule
from dora_dist.runs.fingerprint import Fingerprint
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
    "optim_args",
    "neftune_noise_alpha",
)
"""Trainer settings that a resumed run must not change."""
MEASURED_BY = ("max_examples", "max_new_tokens", "num_beams")
"""Settings of ``evaluation`` under which figures of the same examples differ."""


def fingerprint_of(
    config: RunConfig,
    arguments: TrainingArguments,
    data: RunData,
    plan: TrainingPlan,
    world_size: int,
    initial_ranks: Mapping[str, int],
    schedule: Schedule,
    start_identity: str | None = None,
) -> Fingerprint:
    """The fingerprint of the run that is decided by these; ``initial_ranks`` has the components that each layer
    starts with, and ``start_identity`` is that of the adapter that the run starts from."""
    interval = schedule.interval if isinstance(schedule, BudgetSchedule) else config.pruning.interval
    adapter = {**dataclasses.asdict(config.adapter), "seed": adapter_seed(config)}
    if config.adapter.ranks not in (UNIFORM, *RANKS_FROM_DATA):  # a plan's file may move, or be written again
        digest = sha256(json.dumps(initial_ranks, sort_keys=True).encode()).hexdigest()[:16]
        adapter["ranks"] = f"{sum(initial_ranks.values())} components in {len(initial_ranks)} layers, {digest}"
    if config.adapter.new_tokens is None:  # left out, as in runs of earlier versions
        del adapter["new_tokens"]
    if start_identity is not None:
        adapter["start_from"] = start_identity
    return Fingerprint(
        task=config.task,
        seed=config.seed,
        engine=config.distributed.engine,
        num_steps=arguments.max_steps,
        global_batch=global_batch(arguments, world_size),
        initial_rank=config.adapter.start_rank,
        batching=config.data.batching,
        data_order=plan.digest()[:16],
        model={
            "path": config.model.path,
            "quantization": config.model.quantization,
            "compute_dtype": str(load.resolve_compute_dtype(config.model.compute_dtype)),
            # Left out where there is none, as in runs of earlier versions.
            **({} if config.model.rope_scaling is None else {"rope_scaling": config.model.rope_scaling}),
        },
        adapter=adapter,
        pruning={**dataclasses.asdict(config.pruning), "interval": interval},
        training={
            **method_arguments(arguments),
            LORA_PLUS_RATIO: training_argument(config.training, LORA_PLUS_RATIO),
        },
        examples=_examples_of(config, data.train),
        weights=load.identity_of_weights(config.model.path),
        labels=data.labels or config.data.labels if TASKS[config.task].has_labels else None,
        held_out=_examples_of(config, data.evaluation),
        evaluation={name: getattr(config.evaluation, name) for name in MEASURED_BY} if data.evaluation else {},
    )


def _examples_of(config: RunConfig, sources: Sequence[PreparedSource]) -> dict[str, str]:
    as_text = ", control tokens as text" * (config.data.control_tokens == "text")
    return {source.name: f"{source.counts.examples}, {source.digest[:16]}{as_text}" for source in sources}


def adapter_seed(config: RunConfig) -> int:
    """Seed of the adapter's start: its own, or that of the run."""
    return config.seed if config.adapter.seed is None else config.adapter.seed


def method_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """The Trainer's settings that a resumed run must not change."""
    return {name: _plain(getattr(arguments, name)) for name in METHOD_ARGUMENTS}


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
