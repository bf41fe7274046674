"""From the configuration to the parts of a run. A configuration object goes no further than this file."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist.adapter.from_folder import FoundAdapter
from dora_dist.adapter.model import DynamicLoraForCausalLM, DynamicLoraModel, add_dynamic_lora
from dora_dist.base_model import load
from dora_dist.base_model.kernels import NO_KERNELS, ROPE, TRIED_ALONE, KernelsInUse, use_kernels
from dora_dist.base_model.new_tokens import ids_of, start_rows, untrained_rows
from dora_dist.base_model.quantization import sample_of
from dora_dist.base_model.recomputation import Recomputation
from dora_dist.config.adapter import DRAWN_INITS, PROMPT, RANKS_FROM_DATA, UNIFORM, Init
from dora_dist.config.model import ModelConfig
from dora_dist.config.pruning import ABLATION, ABLATIONS, GROW, MODULES_PER_LAYER, MOVE, NONE, PruningConfig
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import TASKS
from dora_dist.config.training import LORA_PLUS_RATIO, training_argument
from dora_dist.console.text import say
from dora_dist.data.encoding.chat import stop_tokens
from dora_dist.distributed.agreement import Agreement, digest_tensors
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.distributed.sharded_base import ShardedBase
from dora_dist.evaluation.best import BestCheckpoint
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.method.budget import Budget
from dora_dist.method.ranks import LARGEST_GRADIENT, groups_within
from dora_dist.method.schedule import GrowthSchedule
from dora_dist.routing.model import RoutedLoraForCausalLM, add_routed_lora
from dora_dist.runs.checkpoint import read_method_state
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.records import RunRecords
from dora_dist.runs.resume import Earlier
from dora_dist.runs.trackers import TrackedRun, Trackers, known_as
from dora_dist.setup.fingerprint import adapter_seed
from dora_dist.setup.resolve import ResolvedRun
from dora_dist.setup.run_data import RunData
from dora_dist.setup.tasks import TASK_PARTS
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import Criterion, LayerSensitivity, criterion_of
from dora_dist.training.from_data.ranks import RankChoice
from dora_dist.training.from_data.start import DataStart, spread
from dora_dist.training.parts import LoopSettings, TrainingParts, TrainingRows
from dora_dist.training.rules.ablation import Ablation
from dora_dist.training.rules.grow import Grow
from dora_dist.training.rules.modules_per_layer import ModulesPerLayer
from dora_dist.training.rules.move import Move
from dora_dist.training.rules.prune import Prune
from dora_dist.training.rules.rule import Rule
from dora_dist.training.skipped_steps import SkipPolicy
from dora_dist.training.trainer import DynamicLoraTrainer

SEEN_ROWS = 64
"""Rows of a source in which control tokens of its chat template are looked for."""


def check_same_on_all_ranks(
    agreement: Agreement, fingerprint: Fingerprint, recomputation: Recomputation, model: DynamicLoraModel
) -> None:
    """Prove that all ranks have the same settings, training data and base model (a sample of every adapted layer), and
    compute the model and the loss in the same way.

    Raises:
        DisagreementError: they do not; names the first setting or layer that differs.
    """
    facts = {
        **fingerprint.as_dict(),
        "model.fuse": model.fused,
        "recomputed layers": recomputation.count,
        "the kernels in use (model.kernels)": model.kernels.names,
        "whether the loss is computed without logits": model.has_loss_without_logits,
    }
    digests = {name: sha256(json.dumps(value).encode()).digest() for name, value in facts.items()}
    for name, layer in model.adapted_layers().items():
        digests[f"base weights of {name}"] = digest_tensors(sample_of(layer.base_layer))
    agreement.check_equal(digests, "settings, data or base model")


def shards_of_base(config: RunConfig, agreement: Agreement) -> ShardedBase | None:
    """What will hold this rank's part of the base; None where every rank holds all of it. All ranks call it together.

    Raises:
        ExpectedRunError: see :class:`~dora_dist.distributed.sharded_base.ShardedBase`.
    """
    over = config.distributed.shard_base
    return ShardedBase(agreement, over, config.distributed.timeout_minutes) if over else None


def load_base(
    config: RunConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None = None,
    shards: ShardedBase | None = None,
    data: RunData | None = None,
) -> PreTrainedModel:
    """The frozen base, and the head of its task and the rows of new tokens at the start.

    Args:
        config: the run's configuration.
        device: where the model goes.
        tokenizer: the model's tokenizer.
        labels: names of the classes in the order of their numbers, where the task has any.
        shards: hold this rank's part of it; None for all of it.
        data: the data whose control tokens must have trained rows in the base; None for no check.
    """
    head = None
    if TASKS[config.task].trains_head:
        outputs = TASK_PARTS[config.task].num_outputs
        head = load.HeadStart(labels=labels, num_outputs=outputs, seed=adapter_seed(config))
    spec = load.BaseModelSpec.of(config.model, config.task)
    base = load.load_base_model(spec, device, head, None if shards is None else shards.take_layer)
    if data is not None and (warning := untrained_controls(base, tokenizer, data, config.adapter.new_tokens or [])):
        say(warning)
    if shards is not None:
        shards.complete(base)
    if config.adapter.new_tokens is not None:
        start_rows(base, load.read_new_tokens(spec, config.adapter.new_tokens))
    set_special_tokens(base, tokenizer)
    return base


def untrained_controls(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData, new_tokens: Sequence[str]
) -> str | None:
    """A warning of control tokens of conversations for which the base has no trained rows; None where it has them, by
    the first rows of every source. An adapter trains no rows but those of ``new_tokens``."""
    if data.template is None:
        return None
    added = sorted(set(tokenizer.added_tokens_decoder) - set(ids_of(tokenizer, new_tokens)))
    seen = {token for source in data.train for ids in source.dataset[:SEEN_ROWS]["input_ids"] for token in ids}
    read = sorted(seen.intersection(added))
    written = sorted(set(stop_tokens(tokenizer, data.template)).intersection(read))
    found = untrained_rows(base, read, written, added)
    if not found:
        return None
    names = ", ".join(tokenizer.convert_ids_to_tokens(found))
    return (
        f"warning: the chat template writes {names}, of which the base has rows that were never trained (they are next "
        "to nothing, or equal those of other tokens), and an adapter does not train them: set model.path to the model "
        "that was trained on conversations (its name often ends in Instruct, chat or it), or data.chat_template to "
        "plain, which needs none of them"
    )


def load_model(
    config: RunConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None = None,
    shards: ShardedBase | None = None,
    start_adapter: FoundAdapter | None = None,
    data: RunData | None = None,
) -> DynamicLoraModel:
    """The frozen base with its adapter, and the head of its task, at the start; arguments as of :func:`load_base`, and
    ``start_adapter`` has the components that it starts with."""
    base = load_base(config, device, tokenizer, labels, shards, data)
    adapter = config.adapter
    if adapter.dtype == "auto" and not config.distributed.engine.startswith("zero"):
        # Only ZeRO keeps a float32 master copy of low-precision parameters.
        adapter = dataclasses.replace(adapter, dtype="float32")
    # A start from data is made of LoRA's, when the data can go through the model.
    init: Init = adapter.init if adapter.init in DRAWN_INITS else "lora"
    # And so are ranks from data; until then, all layers have as many slots.
    ranks = UNIFORM if adapter.ranks in RANKS_FROM_DATA else adapter.ranks
    adapter = dataclasses.replace(adapter, init=init, ranks=ranks, seed=adapter_seed(config), start_from=None)
    kernels = put_in_kernels(base, config.model, device, shards)
    if adapter.routing == PROMPT:
        return add_routed_lora(base, adapter)
    token_ids = ids_of(tokenizer, adapter.new_tokens or [])
    return add_dynamic_lora(base, adapter, config.model.fuse, kernels, token_ids=token_ids, found=start_adapter)


def put_in_kernels(
    base: PreTrainedModel, config: ModelConfig, device: torch.device, shards: ShardedBase | None
) -> KernelsInUse:
    """Kernels for parts of a base on a GPU, where they are wanted. In a base in shards, only those whose trial runs no
    layer: a layer that runs for itself would be taken for a model of its own by FSDP, and training would fail in its
    first backward.

    Args:
        base: without an adapter, on ``device``.
        config: the model's configuration.
        device: where it is.
        shards: hold this rank's part of it; None for all of it.
    """
    if not config.fuse or config.kernels != "auto" or device.type != "cuda":
        return NO_KERNELS
    if shards is None:
        return use_kernels(base)
    say(f"{ROPE} runs by the model's own code: with distributed.shard_base, no layer can run for a trial of the kernel")
    return use_kernels(base, TRIED_ALONE)


def try_loss_without_logits(model: DynamicLoraModel) -> None:
    """Compute the loss without the logits of all positions where a trial on the model agrees; say where it does not."""
    if not isinstance(model, DynamicLoraForCausalLM) or isinstance(model, RoutedLoraForCausalLM):
        return
    reason = model.use_loss_without_logits()
    if reason is not None:
        name = type(model.get_base_model()).__name__
        say(f"the loss of {name} takes the logits of all positions at once, and their memory: {reason}")


def set_special_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model know its tokenizer's padding token, and if it generates, where texts start and end."""
    if not base.can_generate():
        base.config.pad_token_id = tokenizer.pad_token_id
        return
    for settings in (base.config, base.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id


def build_controller(
    pruning: PruningConfig, seed: int, model: DynamicLoraModel, agreement: Agreement, budget: Budget
) -> DynamicRankController:
    """The method for this model, which it prunes from now on, and this budget; ``seed`` is that of the adapter."""
    layers, head = model.adapted_layers(), model.head_parameters()
    model.has_controller = True
    if pruning.rule == NONE:  # without events, nothing has to be judged
        return DynamicRankController(layers, budget, agreement, head=head)
    criterion: Criterion
    if pruning.rule == GROW:
        criterion = LayerSensitivity([layer.gate for layer in layers.values()])
    elif pruning.importance in ABLATIONS:
        criterion = Ablation(model, exact=pruning.importance == ABLATION)
    else:
        criterion = criterion_of(pruning.importance, list(layers.values()), pruning.smoothing, seed)
    rule: Rule
    if pruning.rule == MOVE:
        rule = Move(layers, budget, num_moved=pruning.moved_per_event, min_rank=pruning.min_rank, seed=seed)
    elif pruning.rule == GROW:
        assert isinstance(budget.schedule, GrowthSchedule)
        rule = Grow(layers, budget, warmup=budget.schedule.interval)
    elif pruning.rule == MODULES_PER_LAYER:
        rule = ModulesPerLayer(layers, budget, pruning.modules_per_layer)
    else:
        rule = Prune(layers, budget, pruning.selection())
    return DynamicRankController(layers, budget, agreement, criterion=criterion, rule=rule, head=head)


def data_start(config: RunConfig, resolved: ResolvedRun) -> DataStart | None:
    """How the adapter starts from data; None where it is drawn."""
    if config.adapter.init in DRAWN_INITS:
        return None
    rows = spread(config.adapter.calibration_rows, resolved.plan.num_rows)
    return DataStart(init=config.adapter.init, rows=rows, seed=adapter_seed(config))


def rank_choice(config: RunConfig, resolved: ResolvedRun, model: DynamicLoraModel) -> RankChoice | None:
    """How the ranks are made from data; None where they are known."""
    if config.adapter.ranks not in RANKS_FROM_DATA:
        return None
    sizes = {name: len(layer.lora_b) * layer.lora_a.shape[1] for name, layer in model.adapted_layers().items()}
    return RankChoice(
        ranks=config.adapter.ranks,
        rows=spread(config.adapter.calibration_rows, resolved.plan.num_rows),
        seed=adapter_seed(config),
        target_rank=config.adapter.target_rank,
        groups=groups_within(sizes, LARGEST_GRADIENT),
    )


def start_trackers(config: RunConfig, resolved: ResolvedRun, earlier: Earlier, agreement: Agreement) -> Trackers:
    """The trackers of ``training.report_to``, on the first rank.

    Raises:
        ValueError: one cannot be started; on all ranks.
    """
    trackers = Trackers()

    def start() -> None:
        run = TrackedRun(
            folder=Path(config.output_dir),
            config=dataclasses.asdict(config),
            arguments=resolved.arguments,
            step=read_method_state(earlier.checkpoint)["step"] if earlier.checkpoint else 0,
            known_as=known_as(Path(config.output_dir)) if earlier.checkpoint else {},
        )
        trackers.start(resolved.arguments.report_to or [], run)

    agreement.of_first("starting the trackers", start)
    return trackers


def build_trainer(
    config: RunConfig,
    resolved: ResolvedRun,
    *,
    model: DynamicLoraModel,
    controller: DynamicRankController,
    agreement: Agreement,
    records: RunRecords,
    evaluator: Evaluator | None,
    notice: PreemptionNotice,
    trackers: Trackers,
) -> DynamicLoraTrainer:
    """The loop."""
    task = TASK_PARTS[config.task]
    parts = TrainingParts(
        controller=controller,
        agreement=agreement,
        records=records,
        evaluator=evaluator,
        notice=notice,
        skip_policy=SkipPolicy(agreement, config.distributed.max_skipped_steps),
        trackers=trackers,
        best=None if resolved.best is None else BestCheckpoint(resolved.best),
        row_losses=task.row_losses(config),
        balance=partial(model.balance_loss, agreement) if isinstance(model, RoutedLoraForCausalLM) else None,
    )
    settings = LoopSettings(
        engine=config.distributed.engine,
        timeout_minutes=config.distributed.timeout_minutes,
        data_start=data_start(config, resolved),
        rank_choice=rank_choice(config, resolved, model),
        adapter_dtype=next(iter(controller.layers.values())).gate.dtype,
        lora_plus_ratio=training_argument(config.training, LORA_PLUS_RATIO),
        equilibrium_weight=config.pruning.equilibrium_weight,
        balance_weight=config.adapter.balance_weight,
        keep_last=config.checkpoint.keep_last,
        fingerprint=resolved.fingerprint,
        recomputation=resolved.recomputation,
    )
    trainer = DynamicLoraTrainer(
        parts=parts,
        settings=settings,
        rows=TrainingRows(
            lengths=resolved.plan.row_lengths(resolved.mixture.lengths), per_epoch=resolved.mixture.rows_per_epoch
        ),
        model=model,
        args=resolved.arguments,
        train_dataset=task.training_rows(resolved),
        data_collator=task.collator(config, model, resolved.tokenizer),
        compute_loss_func=task.loss_over_tokens(),
        processing_class=resolved.tokenizer,
    )
    if isinstance(controller.criterion, Ablation):
        rows = task.scoring_rows(resolved)
        controller.criterion.losses = [partial(trainer.loss_of, row) for row in rows]
    # The trainer prints its own lines of progress.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
