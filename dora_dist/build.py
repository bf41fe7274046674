"""From the configuration to the parts of a run. A configuration object goes no further than this file."""

import dataclasses
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist import backbone
from dora_dist.agreement import Agreement, digest_tensors
from dora_dist.command import say
from dora_dist.config import RunConfig
from dora_dist.controller import DynamicRankController
from dora_dist.criterion import GATE_SENSITIVITY, Criterion, GateSensitivity, SmoothedScores
from dora_dist.data.batches import Collator, FlattenedCollator, PackedCollator, PaddedCollator, PlannedRows
from dora_dist.data.chat import stop_tokens
from dora_dist.evaluation import Evaluator, check_packing
from dora_dist.importance import weight_criterion
from dora_dist.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.preemption import PreemptionNotice
from dora_dist.records import RunRecords
from dora_dist.schedule import BudgetSchedule
from dora_dist.settle import Settled, adapter_seed
from dora_dist.skipping import SkipPolicy
from dora_dist.trainer import DynamicLoraTrainer


def check_same_on_all_ranks(agreement: Agreement, settings: Mapping[str, Any], model: DynamicLoraModel) -> None:
    """Prove that all ranks have the same settings, training data and base model (a sample of every adapted layer), and
    compute the loss in the same way.

    Raises:
        DisagreementError: they do not; names the first setting or layer that differs.
    """
    facts = {**settings, "whether the loss is computed without logits": model.leaves_out_logits}
    digests = {name: sha256(json.dumps(value).encode()).digest() for name, value in facts.items()}
    for name, layer in model.adapted_layers().items():
        digests[f"base weights of {name}"] = digest_tensors(layer.weight.detach().flatten()[:256])
    agreement.check_equal(digests, "settings, data or base model")


def load_base(config: RunConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The frozen base."""
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
    return base


def load_model(config: RunConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> DynamicLoraModel:
    """The frozen base with its adapter at the start."""
    base = load_base(config, device, tokenizer)
    adapter = config.adapter
    if adapter.dtype == "auto" and not config.distributed.engine.startswith("zero"):
        # Only ZeRO keeps a float32 master copy of low-precision parameters.
        adapter = dataclasses.replace(adapter, dtype="float32")
    model = add_dynamic_lora(base, dataclasses.replace(adapter, seed=adapter_seed(config)))
    reason = model.leave_out_logits()
    if reason is not None:
        say(f"the loss of {type(base).__name__} takes the logits of all positions at once, and their memory: {reason}")
    return model


def build_controller(
    config: RunConfig, model: DynamicLoraModel, agreement: Agreement, schedule: BudgetSchedule
) -> DynamicRankController:
    """The method for this model and this budget."""
    return DynamicRankController(
        model.adapted_layers(),
        schedule,
        agreement,
        criterion=build_criterion(config, model),
        budget_unit=config.pruning.budget_unit,
        min_rank=config.pruning.min_rank,
        max_rank=config.pruning.max_rank,
        regrow=config.pruning.regrow,
    )


def build_criterion(config: RunConfig, model: DynamicLoraModel) -> Criterion:
    """What the components are judged by."""
    gates = [layer.gate for layer in model.adapted_layers().values()]
    name = config.pruning.importance
    if name == GATE_SENSITIVITY:
        return GateSensitivity(gates)
    score = weight_criterion(name, adapter_seed(config))
    return SmoothedScores(score, config.pruning.smoothing, sum(gate.numel() for gate in gates), gates[0].device)


def build_evaluator(config: RunConfig, settled: Settled, agreement: Agreement) -> Evaluator | None:
    """The measurement on held-out data, or None where there is none."""
    if not settled.data.evaluation:
        return None
    most = config.evaluation.max_examples
    return Evaluator(
        sources={
            source.name: source.dataset if most is None else source.dataset.take(min(most, len(source.dataset)))
            for source in settled.data.evaluation
        },
        tokenizer=settled.tokenizer,
        agreement=agreement,
        batch_size=settled.arguments.per_device_eval_batch_size,
        exact_match=config.evaluation.exact_match,
        max_new_tokens=config.evaluation.max_new_tokens,
        stop=stop_tokens(settled.tokenizer, settled.data.template),
    )


def build_trainer(
    config: RunConfig,
    settled: Settled,
    *,
    model: DynamicLoraModel,
    controller: DynamicRankController,
    agreement: Agreement,
    records: RunRecords,
    evaluator: Evaluator | None,
    notice: PreemptionNotice,
) -> DynamicLoraTrainer:
    """The loop."""
    trainer = DynamicLoraTrainer(
        model=model,
        args=settled.arguments,
        train_dataset=PlannedRows(settled.data.examples(), settled.plan),
        data_collator=build_collator(config.data.batching, model, settled.tokenizer),
        processing_class=settled.tokenizer,
        controller=controller,
        agreement=agreement,
        records=records,
        evaluator=evaluator,
        notice=notice,
        row_lengths=settled.plan.row_lengths(settled.mixture.lengths),
        rows_per_epoch=settled.mixture.rows_per_epoch,
        engine=config.distributed.engine,
        timeout_minutes=config.distributed.timeout_minutes,
        adapter_dtype=next(iter(controller.layers.values())).gate.dtype,
        equilibrium_weight=config.pruning.equilibrium_weight,
        keep_last=config.checkpoint.keep_last,
        skip_policy=SkipPolicy(agreement, config.distributed.max_skipped_steps),
        fingerprint=settled.fingerprint,
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
