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
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist import backbone
from dora_dist.agreement import Agreement, digest_tensors
from dora_dist.allocation import select_components
from dora_dist.build_data import Mixture, RunData
from dora_dist.config import RunConfig
from dora_dist.controller import DynamicRankController
from dora_dist.data.batches import Collator, FlattenedCollator, PackedCollator, PaddedCollator, PlannedRows
from dora_dist.data.chat import stop_tokens
from dora_dist.data.plan import TrainingPlan
from dora_dist.evaluation import Evaluator, check_packing
from dora_dist.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.records import RunRecords
from dora_dist.schedule import BudgetSchedule
from dora_dist.targets import resolve_targets
from dora_dist.trainer import DynamicLoraTrainer, global_batch
from dora_dist.training_section import DEFAULT_TRAINING_ARGUMENTS

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


def training_arguments(config: RunConfig, mixture: Mixture) -> TrainingArguments:
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
    arguments.max_steps = count_steps(mixture, arguments.max_steps, arguments.num_train_epochs, global_batch(arguments))
    return arguments


def count_steps(mixture: Mixture, max_steps: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps of the run: ``max_steps`` where that is positive, otherwise those of the epochs.

    Raises:
        ValueError: one pass over the data does not fill one global batch.
    """
    rows = mixture.rows_of_epochs(1)
    if rows < global_batch:
        what = "rows of packed examples" if mixture.batching == "packed" else "training examples"
        raise ValueError(
            f"{rows} {what} do not fill one global batch of {global_batch}: lower "
            "training.per_device_train_batch_size or gradient_accumulation_steps, or use fewer processes"
        )
    return max_steps if max_steps > 0 else math.ceil(mixture.rows_of_epochs(epochs) / global_batch)


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
        "initial rank": config.adapter.start_rank,
        "model.path": config.model.path,
        "model.quantization": config.model.quantization,
        "model.compute_dtype": str(backbone.resolve_compute_dtype(config.model.compute_dtype)),
        "seed": config.seed,
        "optimizer steps": arguments.max_steps,
        "global batch": global_batch(arguments),
        "training examples": sum(source.counts.examples for source in data.train),
        "training data": data.digest(),
        "data.batching": config.data.batching,
        "data order": plan.digest(),
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
    config: RunConfig, data: RunData, tokenizer: PreTrainedTokenizerBase, agreement: Agreement, batch_size: int
) -> Evaluator:
    """The measurement on held-out data.

    Raises:
        ValueError: exact match is asked for on data that has no answers.
    """
    most = config.evaluation.max_examples
    examples = {}
    for source in data.evaluation:
        if config.evaluation.exact_match and (source.format == "text" or config.data.train_on == "everything"):
            what = f"{source.name} is plain text" if source.format == "text" else "data.train_on is everything"
            raise ValueError(f"evaluation.exact_match is true, but {what}, which has no answers to compare with")
        examples[source.name] = source.dataset if most is None else source.dataset.take(min(most, len(source.dataset)))
    return Evaluator(
        sources=examples,
        tokenizer=tokenizer,
        agreement=agreement,
        batch_size=batch_size,
        exact_match=config.evaluation.exact_match,
        max_new_tokens=config.evaluation.max_new_tokens,
        stop=stop_tokens(tokenizer, data.template),
    )


def build_trainer(
    config: RunConfig,
    *,
    model: DynamicLoraModel,
    controller: DynamicRankController,
    agreement: Agreement,
    records: RunRecords,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    plan: TrainingPlan,
    rows_per_epoch: int,
    evaluator: Evaluator | None,
    arguments: TrainingArguments,
    run_fingerprint: Mapping[str, Any],
) -> DynamicLoraTrainer:
    """The loop."""
    trainer = DynamicLoraTrainer(
        model=model,
        args=arguments,
        train_dataset=PlannedRows(data.examples(), plan),
        data_collator=build_collator(config.data.batching, model, tokenizer),
        processing_class=tokenizer,
        controller=controller,
        agreement=agreement,
        records=records,
        evaluator=evaluator,
        row_lengths=plan.row_lengths(data.lengths()),
        rows_per_epoch=rows_per_epoch,
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


def build_collator(batching: str, model: DynamicLoraModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    """What makes batches of rows, for the model's attention.

    Raises:
        ValueError: examples of one row would see each other in this model.
    """
    if batching != "packed":
        return PaddedCollator(tokenizer)
    base = model.get_base_model()
    if "flash" in str(base.config._attn_implementation):
        collator: Collator = FlattenedCollator()
    else:
        collator = PackedCollator(tokenizer)
    check_packing(base, collator)
    return collator


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
