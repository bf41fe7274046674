"""The Trainer's settings of a run."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import IntervalStrategy, PreTrainedModel, SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.training_args import OptimizerNames

from dora_dist.base_model import load
from dora_dist.config.adapter import PROMPT, DynamicLoraConfig
from dora_dist.config.run import RunConfig
from dora_dist.config.training import (
    CHECKPOINTING,
    DEFAULT_TRAINING_ARGUMENTS,
    EVALUATION_TIMES,
    LORA_PLUS_RATIO,
    STRATEGIES,
)
from dora_dist.data.mixture import Mixture
from dora_dist.training.batch_size import global_batch

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
WARMUP = ("warmup_steps", "warmup_ratio")
"""Keys of a warm-up; transformers before 5 has the second one too."""
EXTRAS = ("mlflow", "trackio", "wandb")
"""Trackers whose packages are extras of this one, of the same name."""


def training_arguments(
    config: RunConfig, mixture: Mixture, accumulation: int | None = None, world_size: int = 1
) -> TrainingArguments:
    """The Trainer's settings, with ``max_steps`` resolved to the optimizer steps of the whole run.

    Args:
        config: the run's configuration.
        mixture: mixture of its training sources.
        accumulation: gradient accumulation steps; None for those of the configuration.
        world_size: number of ranks of the run.

    Raises:
        ValueError: a value of the training section is not one that ``TrainingArguments`` takes, or it does not go with
            the adapter.
    """
    dtype = load.resolve_compute_dtype(config.model.compute_dtype)
    gpus = torch.cuda.is_available()
    if dtype is torch.bfloat16 and not gpus:
        raise ValueError("model.compute_dtype is bfloat16, but there is no GPU: on CPUs train in float32")
    values = {**DEFAULT_TRAINING_ARGUMENTS, **config.training}
    del values[LORA_PLUS_RATIO]
    if accumulation is not None:
        values["gradient_accumulation_steps"] = accumulation
    for name in CHECKPOINTING:
        if values.get(name):
            # Where it is not said, transformers takes this kind only if nothing else is said, and torch the other one.
            values[f"{name}_kwargs"] = {"use_reentrant": False, **(values.get(f"{name}_kwargs") or {})}
    values.setdefault("dataloader_pin_memory", gpus)
    for name in STRATEGIES:
        if values.get(name) == "epoch":
            raise ValueError(
                f"training.{name} is epoch, but a run is one long sequence of steps without epoch boundaries: "
                f"set it to steps, and {name.removesuffix('strategy')}steps to how many"
            )
    if values.get("save_strategy") == "best":
        raise ValueError(
            "training.save_strategy is best, but a run resumes from its newest checkpoint: set it to steps, and "
            "evaluation.keep_best to the figure by which the best one is kept"
        )
    try:
        arguments = TrainingArguments(**values, **_owned(config, dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    _check_reporters(arguments.report_to or [])
    _check_balance(config.adapter, arguments)
    _check_evaluations(config, IntervalStrategy(arguments.eval_strategy).value)
    epochs = arguments.num_train_epochs
    arguments.max_steps = count_steps(mixture, arguments.max_steps, epochs, global_batch(arguments, world_size))
    if "logging_steps" not in config.training:
        arguments.logging_steps = max(1, min(DEFAULT_TRAINING_ARGUMENTS["logging_steps"], arguments.max_steps // 10))
    _try_optimizer(arguments)
    _check_schedule(config.training, arguments)
    _check_optimizer_keys(config.training, arguments)
    return arguments


def _try_optimizer(arguments: TrainingArguments) -> None:
    """Make optimizer and schedule once, of a matrix that nothing trains: what the Trainer finds wrong with them, it
    would find when the model has been loaded.

    Raises:
        ValueError: names the key.
    """
    matrix = nn.utils.skip_init(nn.Linear, 2, 2, bias=False)  # draws no random number
    try:
        # Of the model, the optimizers that need one look at its parameters only.
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, cast(PreTrainedModel, matrix))
        optimizer = kind([{"params": list(matrix.parameters()), "weight_decay": arguments.weight_decay}], **options)
    except (TypeError, ValueError, ImportError) as error:
        given = f" with training.optim_args {arguments.optim_args!r}" if arguments.optim_args else ""
        raise ValueError(
            f"training.optim is {OptimizerNames(arguments.optim).value}{given}, which cannot be used here: {error}. "
            f"Set it to {DEFAULT_TRAINING_ARGUMENTS['optim']}, or mend what is wrong with it"
        ) from None
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            arguments.get_warmup_steps(arguments.max_steps),
            arguments.max_steps,
            cast(dict[str, Any] | None, arguments.lr_scheduler_kwargs),  # a text has been read by now
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training.lr_scheduler_type is {SchedulerType(arguments.lr_scheduler_type).value}, which does not go with "
            f"training.lr_scheduler_kwargs {arguments.lr_scheduler_kwargs}: {error}. Set them to arguments that this "
            "schedule takes and needs"
        ) from None


def _check_schedule(given: Mapping[str, Any], arguments: TrainingArguments) -> None:
    """Refuse settings of the schedule that transformers leaves out of the one that is chosen, without a word.

    Args:
        given: the user's section.
        arguments: made of it.
    """
    kind = SchedulerType(arguments.lr_scheduler_type)
    warmup = next((name for name in WARMUP if given.get(name)), None)
    if kind is SchedulerType.CONSTANT and warmup is not None:
        raise ValueError(
            f"training.{warmup} is {given[warmup]}, which has no effect: training.lr_scheduler_type is constant, which "
            f"has no warm-up. Set it to constant_with_warmup, or omit training.{warmup}"
        )
    options = arguments.lr_scheduler_kwargs
    if options and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ValueError(
            f"training.lr_scheduler_kwargs is {options}, which has no effect: training.lr_scheduler_type is "
            f"{kind.value}, which takes none. Omit training.lr_scheduler_kwargs, or choose another schedule"
        )


def _check_optimizer_keys(given: Mapping[str, Any], arguments: TrainingArguments) -> None:
    """Refuse settings that the chosen optimizer does not read: with another value, transformers would make the same
    one; arguments as of :func:`_check_schedule`."""
    kind = OptimizerNames(arguments.optim).value
    for name in ADAM:
        if given.get(name) is not None and not _is_read(arguments, name, [0.25, 0.5]):
            raise ValueError(
                f"training.{name} is {given[name]}, which has no effect: training.optim is {kind}, which does not read "
                f"it. Omit training.{name}, or set training.optim to {DEFAULT_TRAINING_ARGUMENTS['optim']}"
            )
    for entry in (arguments.optim_args or "").replace(" ", "").split(","):
        name = entry.partition("=")[0]
        if name and not _is_read(arguments, "optim_args", [f"{name}=0", f"{name}=1"]):
            raise ValueError(
                f"training.optim_args has {entry}, which has no effect: training.optim is {kind}, for which "
                f"transformers does not read {name} there. Omit it; {', '.join(ADAM)} and weight_decay are keys of "
                "training"
            )


def _is_read(arguments: TrainingArguments, name: str, values: Sequence[Any]) -> bool:
    """Whether an optimizer depends on one of the settings: not if two values of it make the same one."""
    matrix, made = nn.utils.skip_init(nn.Linear, 2, 2, bias=False), []
    for value in values:
        changed = copy(arguments)
        setattr(changed, name, value)
        try:
            made.append(Trainer.get_optimizer_cls_and_kwargs(changed, cast(PreTrainedModel, matrix)))
        except Exception:  # whatever a library says of a value that is not sound: it has read it
            return True
    return any(one != made[0] for one in made)


def _owned(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Settings that are not the user's."""
    return {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "bf16": dtype is torch.bfloat16,
        "accelerator_config": {"use_configured_state": True},
        "average_tokens_across_devices": True,
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }


def _check_evaluations(config: RunConfig, strategy: str) -> None:
    """Refuse evaluations without held-out data, and times of evaluations that are never made. A strategy of ``no`` that
    the user has set turns them off by one line, whatever else the file says."""
    if strategy != "no" and config.data.eval is None:
        raise ValueError(f"training.eval_strategy is {strategy}, but data.eval is not set")
    if "eval_strategy" in config.training:
        return
    for name in EVALUATION_TIMES:
        if config.training.get(name):
            needed = "" if config.data.eval is not None else "set data.eval, and "
            raise ValueError(
                f"training.{name} is {config.training[name]}, which has no effect: training.eval_strategy is "
                f"{strategy}. Omit training.{name}, or {needed}set training.eval_strategy to steps"
            )


def _check_balance(adapter: DynamicLoraConfig, arguments: TrainingArguments) -> None:
    """Refuse a balancing loss over less than the global batch: it is not linear in the micro-batches, for the share of
    prompts that choose a module is known after the last of them."""
    accumulation = arguments.gradient_accumulation_steps
    if adapter.routing == PROMPT and adapter.balance_weight and accumulation > 1:
        raise ValueError(
            f"training.gradient_accumulation_steps is {accumulation}, but adapter.routing is {PROMPT}, whose balancing "
            "loss is that of a global batch that goes through the model at once: set it to 1 and raise "
            "training.per_device_train_batch_size or the number of processes, or set adapter.balance_weight to 0 "
            f"(it is {adapter.balance_weight:g})"
        )


def _check_reporters(names: Sequence[str]) -> None:
    """Refuse what the Trainer would not report to, as it finds out itself when the model has been loaded."""
    available = get_available_reporting_integrations()
    for name in names:
        if name in available:
            continue
        try:
            # The Trainer makes one of these too.
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError, AssertionError) as error:
            reason = f"{error}. Install it"
            if name in EXTRAS and find_spec(name) is None:
                reason = f'it needs the package {name}: pip install "dora-dist[{name}]"'
            raise ValueError(
                f"training.report_to has {name}, which cannot be used here: {reason}, or set "
                f"training.report_to to {', '.join([*available, 'none'])}"
            ) from None


def count_steps(mixture: Mixture, max_steps: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps of the run: ``max_steps`` where that is positive, otherwise those of the epochs.

    Raises:
        ValueError: one pass over the data does not fill one global batch.
    """
    rows = mixture.rows_per_epoch
    if rows < global_batch:
        what = "rows of packed examples" if mixture.batching == "packed" else "training examples"
        raise ValueError(
            f"{rows} {what} do not fill one global batch of {global_batch}: lower "
            "training.per_device_train_batch_size or gradient_accumulation_steps, or use fewer processes"
        )
    return max_steps if max_steps > 0 else math.ceil(mixture.rows_of_epochs(epochs) / global_batch)
