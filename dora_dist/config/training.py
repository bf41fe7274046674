"""The ``training`` section: what of ``transformers.TrainingArguments`` is for the user to set, and what is not."""

import dataclasses
import math
import multiprocessing
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from dora_dist.config.checks import KINDS, alternatives, nearest, of_other_trainers, require

OWNED_TRAINING_ARGUMENTS = {
    "output_dir": "set output_dir at the top of the configuration",
    "seed": "set seed at the top of the configuration",
    "data_seed": "set seed at the top of the configuration",
    "deepspeed": "the launch file (launch/*.yaml) configures DeepSpeed, and distributed.engine names the engine",
    "fsdp": "the engines are zero2, ddp and none (distributed.engine)",
    "fsdp_config": "the engines are zero2, ddp and none (distributed.engine)",
    "use_cpu": "it silently replaces DeepSpeed with plain DDP; without a GPU the CPU is used anyway",
    "accelerator_config": "the program sets up the process group itself and hands it to accelerate",
    "parallelism_config": "the program trains data-parallel",
    "bf16": "set model.compute_dtype",
    "fp16": "float16 is not supported; set model.compute_dtype",
    "tf32": "it would change the scores; set model.compute_dtype",
    "ddp_timeout": "set distributed.timeout_minutes",
    "ddp_backend": "NCCL on GPUs and gloo on CPUs",
    "ddp_find_unused_parameters": "every adapter parameter takes part in every step",
    "ddp_broadcast_buffers": "broadcasting masks would hide a disagreement between ranks instead of reporting it",
    "average_tokens_across_devices": "without it, the loss would depend on the number of ranks",
    "group_by_length": "the data order is a function of seed and position only, so that it can be resumed anywhere",
    "train_sampling_strategy": "the data order is a function of seed and position only, so that it can be resumed",
    "dataloader_drop_last": "every step sees a full global batch; an epoch runs on into the next one",
    "ignore_data_skip": "a resumed run continues with the data that the interrupted one had not seen",
    "remove_unused_columns": "the examples have just the columns that the model takes",
    "auto_find_batch_size": "the batch size decides the schedule and must be known before the run",
    "resume_from_checkpoint": "set checkpoint.resume",
    "save_total_limit": "set checkpoint.keep_last",
    "save_only_model": "such a checkpoint cannot be resumed",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always lead to a checkpoint at the end of the step",
    "save_on_each_node": "all ranks write one checkpoint in output_dir, which all nodes share",
    "load_best_model_at_end": "set evaluation.keep_best",
    "metric_for_best_model": "set evaluation.keep_best",
    "greater_is_better": "evaluation.keep_best takes less of a loss, and more of everything else",
    "logging_nan_inf_filter": "it hides a loss that is not finite",
    "eval_on_start": "set evaluation.before",
    "include_num_input_tokens_seen": "tokens are counted by the program",
    "disable_tqdm": "the program prints its own lines of progress",
    "push_to_hub": "upload the adapter folder when the run has ended",
    **dict.fromkeys(
        (
            *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_accumulation_steps"),
            *("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics"),
        ),
        "the program evaluates by itself, as it trains: the section evaluation says what is measured",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command trains, and evaluates where data.eval is set"),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "upload the adapter folder when the run has ended",
    ),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "set model.kernels"),
    **dict.fromkeys(("label_names", "length_column_name"), "the examples have just the columns that the model takes"),
    "local_rank": "the launcher sets it",
    "label_smoothing_factor": "the loss is the model's own cross-entropy",
    "optim_target_modules": "set adapter.target_modules",
}

LORA_PLUS_RATIO = "lora_plus_ratio"
"""Key of this section that is no name of ``TrainingArguments``: learning rate of the columns b_i over that of all else
(LoRA+, Hayou et al., 2024, arXiv 2402.12354)."""

STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")
EVALUATION_TIMES = ("eval_steps", "eval_delay")
"""Keys that say when evaluations at steps are made, without an effect unless ``eval_strategy`` is ``steps``."""
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    LORA_PLUS_RATIO: (lambda value: 0 < value < math.inf, "be positive, and finite"),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "num_train_epochs"),
            *("eval_delay", "neftune_noise_alpha"),
        ),
        (lambda value: 0 <= value < math.inf, "be at least 0, and finite"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "lie in [0, 1)")),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"),
        (
            lambda value: 0 < value < 1 or (value < math.inf and value >= 1 and value == int(value)),
            "be a whole number of at least 1, or a share of the run between 0 and 1",
        ),
    ),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb"),
        ),
        (lambda value: value >= 1, "be a whole number of at least 1"),
    ),
    "optim_args": (
        lambda value: all(len(entry.split("=")) == 2 for entry in value.split(",")),
        "be NAME=VALUE, or several of them with commas between",
    ),
    "dataloader_num_workers": (lambda value: value >= 0, "be at least 0"),
}
"""Key -> the rule that its value must meet unless it is null, as a function and in words."""

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""transformers' names for one switch: the present one, which wins, and the one before 5.23."""
REFUSED_CHECKPOINTING = {
    "use_reentrant": (
        True,
        "the reentrant kind runs the backward of a layer as a pass of its own, in which no gradient comes to what the "
        "layers have in common; leave it out",
    ),
    "preserve_rng_state": (False, "dropout would drop other entries when a layer is computed again; leave it out"),
    "every_n_layers": (None, "set model.recompute_layers to a number of layers, which the estimate of memory knows"),
}
"""Entry of the switch's ``_kwargs`` -> the value that is refused (None for any), and why."""

REFUSED_CHOICES = {
    "lr_scheduler_type": dict.fromkeys(
        ("reduce_lr_on_plateau", "greedy"),
        "it sets the rate by losses that it has seen, of which a resumed run would know nothing; set it to linear or "
        "cosine, say",
    ),
    "optim": dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "it trains at another point than the one that it has found, and the trained one would be evaluated, scored and "
        "saved; set it to adamw_torch, say",
    ),
}
"""Name -> the values that are refused, and why."""

DEFAULT_TRAINING_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "report_to": ["tensorboard"],
    LORA_PLUS_RATIO: 1.0,
}


def owner_of(name: str) -> str:
    """Hint at a key of ``TrainingArguments``: why it is refused, or ``; here it is training.X``. Empty for others."""
    from transformers import TrainingArguments

    if name in OWNED_TRAINING_ARGUMENTS:
        return f" ({OWNED_TRAINING_ARGUMENTS[name]})"
    known = {entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init}
    return f"; here it is training.{name}" if name in known else ""


def with_strategies(training: dict[str, Any]) -> dict[str, Any]:
    """The section with ``no`` where a strategy is false: YAML reads an unquoted no as false."""
    return {name: "no" if value is False and name in STRATEGIES else value for name, value in training.items()}


def check_training_section(training: dict[str, Any]) -> None:
    """Refuse names that ``TrainingArguments`` does not know, those that the program must set itself, values of another
    kind (``TrainingArguments`` takes any), and impossible numbers.

    Raises:
        ValueError: one is there; the message has the nearest valid name, or the reason.
    """
    from transformers import TrainingArguments

    known = {entry.name: entry.type for entry in dataclasses.fields(TrainingArguments) if entry.init}
    known[LORA_PLUS_RATIO] = float
    for name, value in training.items():
        if name in OWNED_TRAINING_ARGUMENTS:
            raise ValueError(f"training.{name} is set by the program: {OWNED_TRAINING_ARGUMENTS[name]}")
        if name not in known:
            hint = of_other_trainers(name) or nearest(name, known)
            raise ValueError(f"training.{name} is not a TrainingArguments name{hint}")
        _check_kind(f"training.{name}", value, known[name], _choices(name, known[name]))
        if name in RULES and value is not None:
            holds, rule = RULES[name]
            require(holds(value), f"training.{name}", value, rule)
        for choice, reason in REFUSED_CHOICES.get(name, {}).items():
            if value == choice:
                raise ValueError(f"training.{name} is {value}, which is not supported: {reason}")
    for name in CHECKPOINTING:
        _check_checkpointing(training, name)
    if training.get("dataloader_persistent_workers") and not training.get("dataloader_num_workers"):
        raise ValueError(
            "training.dataloader_persistent_workers is true, but training.dataloader_num_workers is 0, so that there "
            "are none: set it to how many, or leave training.dataloader_persistent_workers out"
        )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _choices(name: str, annotation: Any) -> list[str]:
    """The texts that a field of ``TrainingArguments`` takes; none where it takes any, or no text."""
    from transformers.training_args import trainer_log_levels

    if name in ("log_level", "log_level_replica"):
        return list(trainer_log_levels)
    if name == "dataloader_multiprocessing_context":
        return multiprocessing.get_all_start_methods()
    enumerations = [kind for kind in _members(annotation) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [member.value for enumeration in enumerations for member in enumeration]


def _check_kind(key: str, value: Any, annotation: Any, choices: list[str]) -> None:
    """Refuse a value that is not of the annotated types, or a text that is none of the choices, if there are any."""
    kinds = set()
    for member in _members(annotation):
        origin = get_origin(member)
        kinds |= {type(choice) for choice in get_args(member)} if origin is Literal else {origin or member}
    if dict in kinds:
        kinds -= {str}  # a mapping as JSON, which YAML does not need
    if float in kinds:
        kinds |= {int}
    # A bool is an int to isinstance.
    good = bool in kinds if isinstance(value, bool) else isinstance(value, tuple(kinds))
    wanted = [words for kind, words in KINDS.items() if kind in kinds and not (kind is int and float in kinds)]
    quote = str in kinds and isinstance(value, bool | int | float)
    require(good, key, repr(value), f"be {alternatives(wanted)}{': put it in quotation marks' * quote}")
    if choices and isinstance(value, str):
        require(value in choices, key, value, f"be one of {', '.join(choices)}{nearest(value, choices)}")


def _check_checkpointing(training: dict[str, Any], name: str) -> None:
    """Refuse ways of recomputing that give other numbers."""
    options = training.get(f"{name}_kwargs") or {}
    for option, (refused, reason) in REFUSED_CHECKPOINTING.items():
        if option in options and refused in (None, options[option]):
            raise ValueError(
                f"training.{name}_kwargs has {option}: {options[option]}, which is not supported: {reason}"
            )


def recomputes_layers(training: dict[str, Any]) -> bool:
    """Whether the section says that layers are computed again in the backward."""
    given = [training[name] for name in CHECKPOINTING if training.get(name) is not None]
    return bool(given and given[0])


def training_argument(training: dict[str, Any], name: str) -> Any:
    """A value of the training section, or its default."""
    from transformers import TrainingArguments

    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
    return {**defaults, **DEFAULT_TRAINING_ARGUMENTS, **training}[name]


def length_of_run(training: dict[str, Any]) -> tuple[int, float]:
    """``max_steps``, which counts where it is positive, and the passes over the data, which count otherwise.

    Raises:
        ValueError: neither gives the run a step.
    """
    max_steps, epochs = whole_number(training, "max_steps"), training_argument(training, "num_train_epochs")
    if max_steps <= 0 and not 0 < epochs < math.inf:
        raise ValueError(f"training.num_train_epochs is {epochs}, but must be positive")
    return max_steps, epochs


def whole_number(training: dict[str, Any], name: str) -> int:
    """A whole number of a checked training section, or its default."""
    value: int = training_argument(training, name)
    return value
