"""From the configuration to the parts of a run. A configuration object goes no further than this file."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist import backbone
from dora_dist.agreement import Agreement, digest_tensors
from dora_dist.allocation import select_components
from dora_dist.command import say
from dora_dist.config import DataConfig, RunConfig
from dora_dist.controller import DynamicRankController
from dora_dist.data.encode import IGNORED, EncodedExamples, encode_examples
from dora_dist.data.order import TrainingOrder
from dora_dist.data.rows import read_examples
from dora_dist.evaluation import Evaluator
from dora_dist.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.records import RunRecords
from dora_dist.schedule import BudgetSchedule
from dora_dist.targets import resolve_targets
from dora_dist.trainer import DynamicLoraTrainer, global_batch
from dora_dist.training_section import DEFAULT_TRAINING_ARGUMENTS

LEAST_TRAINED_SHARE = 0.01

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


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, path: str | list[str]) -> EncodedExamples:
    """Read, check and encode one set of files.

    Raises:
        ValueError: the data cannot be used, or next to nothing of it would be trained on.
    """
    data = encode_examples(read_examples(path, config.format), tokenizer, config.max_length, config.overlong)
    if data.num_dropped:
        total = data.num_dropped + len(data.examples)
        say(f"{path}: dropped {data.num_dropped} of {total} examples, longer than data.max_length {config.max_length}")
    if data.trained_tokens < LEAST_TRAINED_SHARE * data.tokens:
        raise ValueError(
            f"{path}: only {data.trained_tokens} of {data.tokens} tokens are answers to learn from, under "
            f"{LEAST_TRAINED_SHARE:.0%}; check that the answers are in the right field"
        )
    return data


def training_arguments(config: RunConfig, num_examples: int) -> TrainingArguments:
    """The Trainer's settings, with ``max_steps`` resolved to the optimizer steps of the whole run.

    Raises:
        ValueError: a value of the training section is not one that ``TrainingArguments`` takes.
    """
    dtype = backbone.resolve_compute_dtype(config.model.compute_dtype)
    gpus = torch.cuda.is_available()
    if dtype is torch.bfloat16 and not gpus:
        raise ValueError("model.compute_dtype is bfloat16, but there is no GPU: on CPUs train in float32")
    values = {**DEFAULT_TRAINING_ARGUMENTS, **config.training}
    if values.get("gradient_checkpointing"):
        # The reentrant kind would cut the gradient at the frozen embedding.
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    values.setdefault("dataloader_pin_memory", gpus)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / "tensorboard")
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if values.get(name) == "epoch":
            raise ValueError(
                f"training.{name} is epoch, but a run is one long sequence of steps without epoch boundaries: "
                f"set it to steps, and {name.removesuffix('strategy')}steps to how many"
            )
    owned: dict[str, Any] = {
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
    try:
        arguments = TrainingArguments(**values, **owned)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    if arguments.eval_strategy != "no" and config.data.eval is None:
        raise ValueError(f"training.eval_strategy is {arguments.eval_strategy.value}, but data.eval is not set")
    batch = global_batch(arguments)
    if num_examples < batch:
        raise ValueError(
            f"{num_examples} training examples do not fill one global batch of {batch}: lower "
            "training.per_device_train_batch_size or gradient_accumulation_steps, or use fewer processes"
        )
    if arguments.max_steps <= 0:
        arguments.max_steps = math.ceil(arguments.num_train_epochs * num_examples / batch)
    return arguments


def fingerprint(config: RunConfig, arguments: TrainingArguments, data: EncodedExamples) -> dict[str, Any]:
    """What all ranks of a run have in common, and a run with the one whose checkpoint it continues."""
    adapter = {f"adapter.{name}": value for name, value in dataclasses.asdict(config.adapter).items()}
    pruning = {f"pruning.{name}": value for name, value in dataclasses.asdict(config.pruning).items()}
    adapter["adapter.seed"] = adapter_seed(config)
    training = {f"training.{name}": _plain(getattr(arguments, name)) for name in METHOD_ARGUMENTS}
    return {
        **adapter,
        **pruning,
        **training,
        "initial rank": config.adapter.start_rank,
        "model.path": config.model.path,
        "model.quantization": config.model.quantization,
        "model.compute_dtype": str(backbone.resolve_compute_dtype(config.model.compute_dtype)),
        "seed": config.seed,
        "optimizer steps": arguments.max_steps,
        "global batch": global_batch(arguments),
        "training examples": len(data.examples),
        "training data": data.digest,
        "distributed.engine": config.distributed.engine,
        "number of processes": arguments.world_size,
    }


def adapter_seed(config: RunConfig) -> int:
    """Seed of the adapter's start: its own, or that of the run."""
    return config.seed if config.adapter.seed is None else config.adapter.seed


def check_same_on_all_ranks(agreement: Agreement, settings: Mapping[str, Any], model: DynamicLoraModel) -> None:
    """Prove that all ranks have the same settings, training data and base model (a sample of every adapted layer).

    Raises:
        DisagreementError: they do not; names the first setting or layer that differs.
    """
    digests = {name: sha256(json.dumps(value).encode()).digest() for name, value in settings.items()}
    for name, layer in model.adapted_layers().items():
        digests[f"base weights of {name}"] = digest_tensors(layer.weight.detach().flatten()[:256])
    agreement.check_equal(digests, "settings, data or base model")


def check_method(config: RunConfig, total_steps: int) -> None:
    """Try targets, schedule and bounds on the model's structure alone, before its weights are read.

    Raises:
        ValueError: ``adapter.target_modules`` matches nothing, the run is too short to prune, or the bounds on the
            ranks cannot be met.
    """
    under_zero = config.distributed.engine.startswith("zero")
    dtype = str(backbone.resolve_compute_dtype(config.model.compute_dtype)).removeprefix("torch.")
    if under_zero and config.adapter.dtype not in ("auto", dtype):
        raise ValueError(
            f"adapter.dtype is {config.adapter.dtype}, but DeepSpeed casts all parameters to the compute dtype {dtype} "
            "(and keeps a float32 master copy): leave it at auto"
        )
    skeleton = backbone.load_skeleton(config.model.path, config.model.trust_remote_code)
    names = resolve_targets(skeleton, config.adapter.target_modules)
    schedule = build_schedule(config, len(names), total_steps)
    scores = {name: torch.zeros(schedule.initial_rank) for name in names}
    select_components(scores, schedule.final_num_kept, config.pruning.min_rank, config.pruning.max_rank)


def load_model(config: RunConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> DynamicLoraModel:
    """The frozen base with its adapter at the start."""
    dtype = backbone.resolve_compute_dtype(config.model.compute_dtype)
    base = backbone.load_backbone(
        config.model.path,
        quantization=config.model.quantization,
        compute_dtype=dtype,
        device=device,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    for settings in (base.config, base.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
    adapter = config.adapter
    if adapter.dtype == "auto" and not config.distributed.engine.startswith("zero"):
        # Only ZeRO keeps a float32 master copy of low-precision parameters.
        adapter = dataclasses.replace(adapter, dtype="float32")
    return add_dynamic_lora(base, dataclasses.replace(adapter, seed=adapter_seed(config)))


def build_schedule(config: RunConfig, num_layers: int, total_steps: int) -> BudgetSchedule:
    """The budget over the run.

    Raises:
        ValueError: the run is too short for the phases of the pruning section.
    """
    return BudgetSchedule(
        total_steps=total_steps,
        num_layers=num_layers,
        initial_rank=config.adapter.start_rank,
        target_rank=config.adapter.target_rank,
        warmup_fraction=config.pruning.warmup_fraction,
        final_fraction=config.pruning.final_fraction,
        interval=config.pruning.interval,
    )


def build_controller(
    config: RunConfig, model: DynamicLoraModel, agreement: Agreement, total_steps: int
) -> DynamicRankController:
    """The method for this model and this many optimizer steps."""
    layers = model.adapted_layers()
    return DynamicRankController(
        layers,
        build_schedule(config, len(layers), total_steps),
        agreement,
        smoothing=config.pruning.smoothing,
        min_rank=config.pruning.min_rank,
        max_rank=config.pruning.max_rank,
        regrow=config.pruning.regrow,
    )


def build_evaluator(
    config: RunConfig, data: EncodedExamples, tokenizer: PreTrainedTokenizerBase, agreement: Agreement, batch_size: int
) -> Evaluator:
    """The measurement on held-out data."""
    most = config.evaluation.max_examples
    if most is not None and most < len(data.examples):
        data = dataclasses.replace(data, dataset=data.dataset.select(range(most)), examples=data.examples[:most])
    return Evaluator(
        data=data,
        tokenizer=tokenizer,
        agreement=agreement,
        batch_size=batch_size,
        exact_match=config.evaluation.exact_match,
        max_new_tokens=config.evaluation.max_new_tokens,
    )


def build_trainer(
    config: RunConfig,
    *,
    model: DynamicLoraModel,
    controller: DynamicRankController,
    agreement: Agreement,
    records: RunRecords,
    tokenizer: PreTrainedTokenizerBase,
    train_data: EncodedExamples,
    evaluator: Evaluator | None,
    arguments: TrainingArguments,
    run_fingerprint: Mapping[str, Any],
) -> DynamicLoraTrainer:
    """The loop."""
    num_samples = arguments.max_steps * global_batch(arguments)
    trainer = DynamicLoraTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data.dataset,
        eval_dataset=evaluator.data.dataset if evaluator else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        controller=controller,
        agreement=agreement,
        records=records,
        evaluator=evaluator,
        order=TrainingOrder(len(train_data.examples), num_samples, config.seed),
        engine=config.distributed.engine,
        adapter_dtype=next(iter(controller.layers.values())).gate.dtype,
        equilibrium_weight=config.pruning.equilibrium_weight,
        keep_last=config.checkpoint.keep_last,
        fingerprint=run_fingerprint,
    )
    # The trainer prints its own lines of progress.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
