"""What a run will be, decided from its configuration and its data before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from dora_dist.adapter.from_folder import FoundAdapter, describe_start, find_start
from dora_dist.adapter.ranks import resolve_ranks
from dora_dist.base_model import block_weights, load
from dora_dist.base_model.new_tokens import fit_rows, ids_of, num_row_parameters
from dora_dist.base_model.recomputation import Recomputation
from dora_dist.base_model.shape import input_embedding, linear_layer, positions_of
from dora_dist.config.adapter import PROMPT, RANKS_FROM_DATA, UNIFORM, DynamicLoraConfig
from dora_dist.config.checks import require
from dora_dist.config.pruning import GATE_SENSITIVITY, GROW, MODULES_PER_LAYER, NONE, PruningConfig
from dora_dist.config.run import EvaluationConfig, RunConfig
from dora_dist.config.tasks import CAUSAL_LM, EXACT_MATCH, FINAL_NUMBER, TASKS
from dora_dist.data.mixture import Mixture
from dora_dist.data.plan import TrainingPlan
from dora_dist.data.prepared import PreparedSource
from dora_dist.evaluation.best import BestRule
from dora_dist.evaluation.metrics import final_number
from dora_dist.method.budget import Budget, component_costs
from dora_dist.method.modules import highest_rank
from dora_dist.method.schedule import (
    BudgetSchedule,
    FixedRanks,
    GrowthSchedule,
    OneEvent,
    Schedule,
    automatic_interval,
    twentieth_of_phase,
)
from dora_dist.routing.model import routed_blocks
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.setup.best import best_rule
from dora_dist.setup.fingerprint import fingerprint_of
from dora_dist.setup.recomputation import resolve_recomputation
from dora_dist.setup.run_data import RunData, build_mixture, describe_data
from dora_dist.setup.sharding import check_sharding
from dora_dist.setup.training_arguments import training_arguments
from dora_dist.training.batch_size import global_batch

FEW_EVENTS = 5
"""Pruning events below which a run is warned about."""

LAYER_BY_LAYER = (
    "adapter.routing is prompt: the model runs layer by layer, as with model.fuse false and model.kernels none, and "
    "the adapter is read by dora_dist.load_adapter and dora-dist generate only"
)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """All of a run that is decided before a weight is read.

    Attributes:
        tokenizer: the model's tokenizer, with the chat template for conversations.
        data: all sources.
        mixture: mixture of the training sources.
        arguments: the Trainer's settings; ``max_steps`` is the number of optimizer steps of the run.
        plan: which rows are trained when.
        initial_ranks: layer that is adapted -> components at the start.
        unadapted: what ``all-linear`` leaves out, in words; None where that is nothing, or the layers were named.
        budget: the budget at every step.
        recomputation: layers that are computed again in the backward.
        fingerprint: settings that a resumed run must not change.
        best: how the best checkpoint is found; None where the last one is taken.
        row_parameters: trained parameters in the rows of new tokens.
        start_adapter: adapter whose components the model starts with; None for new ones, and where a checkpoint has
            them.
    """

    tokenizer: PreTrainedTokenizerBase
    data: RunData
    mixture: Mixture
    arguments: TrainingArguments
    plan: TrainingPlan
    initial_ranks: dict[str, int]
    unadapted: str | None
    budget: Budget
    recomputation: Recomputation
    fingerprint: Fingerprint
    best: BestRule | None
    row_parameters: int = 0
    start_adapter: FoundAdapter | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all optimizer steps, without padding."""
        return int(self.plan.row_lengths(self.mixture.lengths).sum())

    def padding_share(self) -> float:
        """Share of padding in all tokens that the run computes."""
        return self.plan.padding_share(self.mixture.lengths, self.arguments.per_device_train_batch_size)

    def remarks(self) -> list[str]:
        """What a user should know of the data, and of a schedule that hardly is one."""
        schedule = self.budget.schedule
        num_events = len(schedule.prune_steps)
        if num_events >= FEW_EVENTS or self.budget.initial == self.budget.final:
            return self.data.remarks()
        assert isinstance(schedule, BudgetSchedule), "what is pruned has one"
        importance = self.fingerprint.pruning["importance"]
        fitting = interval_for(importance, schedule.total_steps, schedule.warmup_fraction, schedule.final_fraction)
        advice = (
            f"set pruning.interval to auto, which is {fitting} here" if fitting < schedule.interval else "train longer"
        )
        does = "removes" if self.budget.initial > self.budget.final else "adds"
        return [
            *self.data.remarks(),
            f"warning: pruning.interval {schedule.interval} gives {num_events} pruning events in "
            f"{schedule.total_steps} steps, so that each {does} many components at once: {advice}",
        ]

    def describe_data(self) -> dict[str, Any]:
        """What the run's record says about its data."""
        return {**describe_data(self.data, self.mixture), "padding_share": self.padding_share()}


def resolve_run(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    accumulation: int | None = None,
    world_size: int = 1,
    card: int | None = None,
    started_from: str | None = None,
) -> ResolvedRun:
    """Resolve everything that needs no weights, and refuse what cannot work.

    Args:
        config: the run's configuration.
        tokenizer: the model's tokenizer.
        data: all sources.
        accumulation: gradient accumulation steps; None for those of the configuration.
        world_size: number of ranks of the run.
        card: bytes of the smallest GPU of the run; None where a rank has none.
        started_from: identity of the adapter that an earlier start of the run began with; None for a run that begins,
            and for one with a new adapter.

    Raises:
        ValueError: data, training section, targets or schedule cannot work together.
    """
    notes = _check_answers(config, data)
    mixture = build_mixture(config.data, data.train, config.seed, config.pruning.num_held_back)
    arguments = training_arguments(config, mixture, accumulation, world_size)
    plan = mixture.plan(arguments.max_steps, global_batch(arguments, world_size))
    spec = load.BaseModelSpec.of(config.model, config.task)
    skeleton = load.load_skeleton(spec)
    load.check_attention(spec, skeleton)
    check_sharding(config, skeleton, torch.__version__)
    new_tokens = config.adapter.new_tokens or []
    if new_tokens:
        fit_rows(skeleton, ids_of(tokenizer, new_tokens))
    notes += check_vocabulary(skeleton, tokenizer, data)
    initial_ranks, budget = check_method(config, skeleton, arguments.max_steps)
    check_context(skeleton, data)
    start_adapter, identity, start_remarks = _resolve_start(config, skeleton, initial_ranks, started_from)
    notes += start_remarks
    recomputation, remarks = resolve_recomputation(config, skeleton, data, world_size, card)
    if config.adapter.routing == PROMPT:
        remarks = [*remarks, LAYER_BY_LAYER]
    data = replace(data, notes=[*data.notes, *notes, *remarks])
    return ResolvedRun(
        tokenizer=tokenizer,
        data=data,
        mixture=mixture,
        arguments=arguments,
        plan=plan,
        initial_ranks=initial_ranks,
        unadapted=block_weights.describe_left_out(skeleton, config.adapter, initial_ranks),
        budget=budget,
        recomputation=recomputation,
        fingerprint=fingerprint_of(config, arguments, data, plan, world_size, initial_ranks, budget.schedule, identity),
        best=best_rule(config, arguments, data, budget.schedule.final_step),
        row_parameters=num_row_parameters(skeleton, len(new_tokens)),
        start_adapter=start_adapter,
    )


def _resolve_start(
    config: RunConfig, skeleton: PreTrainedModel, initial_ranks: Mapping[str, int], started_from: str | None
) -> tuple[FoundAdapter | None, str | None, list[str]]:
    """The adapter of ``adapter.start_from``, its identity, and remarks; arguments as of :func:`resolve_run`.

    A run that goes on has its components in the checkpoint: the folder is compared where it is still there.
    """
    folder = config.adapter.start_from
    if started_from is not None and folder is not None and not Path(folder).expanduser().exists():
        gone = f"adapter.start_from is {folder}, which is not there any more: the run has what it began with"
        return None, started_from, [gone]
    found = find_start(skeleton, config.adapter, initial_ranks)
    if found is None:
        return None, None, []
    remarks = describe_start(found, config.model.path, initial_ranks) if started_from is None else []
    return (found if started_from is None else None), found.identity(), remarks


def _check_answers(config: RunConfig, data: RunData) -> list[str]:
    """Refuse what could not be measured; returns warnings of what can be measured in part."""
    if "f1" in (config.evaluation.metrics or []) and data.labels is not None and len(data.labels) != 2:
        raise ValueError(
            f"evaluation.metrics has f1, which is of the second of two classes, but there are {len(data.labels)}: "
            f"{', '.join(data.labels)}; leave it out"
        )
    warnings = []
    for source in data.evaluation:
        if config.task == CAUSAL_LM and config.measured:
            _check_asked(config, source)
        if config.task == CAUSAL_LM and EXACT_MATCH in config.measured:
            warnings += _check_lengths(config.evaluation, source)
        if data.labels is not None:
            warnings += _check_first_labels(config.evaluation.max_examples, source)
    return warnings


def _check_first_labels(most: int | None, source: PreparedSource) -> list[str]:
    """Warn where all examples that are measured have one label, as in rows that are sorted by it."""
    labels = source.column("label").to_pylist()
    if most is None or len(set(labels[:most])) > 1 or len(set(labels)) == 1:
        return []
    return [
        f"warning: evaluation.max_examples {most} takes the first examples of {source.name}, which all have the label "
        f"{labels[0]!r}: shuffle the rows, or measure more of them"
    ]


def _check_lengths(evaluation: EvaluationConfig, source: PreparedSource) -> list[str]:
    """Warn of references that no generated answer is long enough to equal; refuse them where all are so long.

    The token that ends an answer need not be generated.
    """
    tokens = (source.lengths() - source.column("answer_start").to_numpy() - 1)[: evaluation.max_examples]
    limit, longer = evaluation.max_new_tokens, int((tokens > evaluation.max_new_tokens).sum())
    if longer == len(tokens):
        raise ValueError(
            f"evaluation.max_new_tokens is {limit}, but all {longer} references of {source.name} are longer (the "
            f"shortest has {tokens.min()} tokens), so that no answer could equal one: set it to {tokens.max()}, which "
            "holds all of them, or measure no exact match"
        )
    if not longer:
        return []
    return [
        f"warning: {longer} of {len(tokens)} references of {source.name} are longer than evaluation.max_new_tokens "
        f"{limit}, so that no answer can equal them: set it to {tokens.max()}, which holds all of them"
    ]


def _check_asked(config: RunConfig, source: PreparedSource) -> None:
    """Refuse held-out examples for which no answer can be generated and judged."""
    asks, most = config.evaluation.asks, config.evaluation.max_examples
    if source.format == "text" or config.data.train_on == "everything":
        what = f"{source.name} is plain text" if source.format == "text" else "data.train_on is everything"
        raise ValueError(f"{asks}, but {what}, which has no answers to compare with: leave out the one or the other")
    unasked = source.unprompted()
    if most is not None:
        unasked = unasked[unasked < most]
    if len(unasked):
        raise ValueError(
            f"{asks}, but {len(unasked)} of {source.counts.examples} examples of {source.name} have an empty prompt "
            f"(first {source.dataset[int(unasked[0])]['place']}), so that the model would be asked nothing: give them "
            "a prompt, leave them out, or measure the loss only"
        )
    if FINAL_NUMBER not in config.measured:
        return
    answers = source.column("answer").slice(0, most).to_pylist()
    if without := [number for number, answer in enumerate(answers) if final_number(answer) is None]:
        raise ValueError(
            f"evaluation.metrics has {FINAL_NUMBER}, but {len(without)} of {source.counts.examples} examples of "
            f"{source.name} have an answer without a number (first {source.dataset[without[0]]['place']}), so that "
            f"none could be right: leave them out, or {FINAL_NUMBER}"
        )


def check_method(config: RunConfig, skeleton: PreTrainedModel, total_steps: int) -> tuple[dict[str, int], Budget]:
    """Try targets and schedule on the model's structure alone, before its weights are read.

    Args:
        config: the run's configuration.
        skeleton: the model without weights.
        total_steps: optimizer steps of the run.

    Returns:
        Layer that is adapted -> components at the start, and the budget over the run.

    Raises:
        ValueError: ``adapter.target_modules`` matches nothing, quantization would leave too much as it is, or the run
            is too short to prune; ``adapter.dtype`` does not go with the engine.
    """
    block_weights.check_quantized(skeleton, config.model.quantization, config.model.allow_unquantized)
    dtype = str(load.resolve_compute_dtype(config.model.compute_dtype)).removeprefix("torch.")
    _check_adapter_dtype(config, dtype)
    _check_head_dtype(config, dtype)
    initial_ranks = resolve_ranks(skeleton, config.adapter)
    if config.adapter.routing == PROMPT:
        routed_blocks(skeleton, list(initial_ranks), config.adapter.modules_per_prompt)
    linears = {name: linear_layer(skeleton, name) for name in initial_ranks}
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    if config.adapter.ranks in (UNIFORM, *RANKS_FROM_DATA):
        most = min(shapes[narrowest])
        require(
            config.adapter.num_slots <= most,
            _key_of_slots(config.adapter),
            config.adapter.num_slots,
            f"be at most {most}, the largest rank that the layer {narrowest} can have, which is "
            f"{' x '.join(map(str, shapes[narrowest]))}; or leave that layer out of adapter.target_modules",
        )
    if config.adapter.ranks in RANKS_FROM_DATA:
        schedule: Schedule = FixedRanks(dict.fromkeys(initial_ranks, config.adapter.target_rank))
    elif config.pruning.rule == NONE:
        schedule = FixedRanks(initial_ranks)
    else:
        schedule = build_schedule(config.pruning, config.adapter, len(initial_ranks), total_steps)
    budget = Budget(schedule, component_costs(shapes, config.pruning.budget_unit))
    if config.pruning.rule == MODULES_PER_LAYER:
        _check_plan(config, budget, shapes)
    return initial_ranks, budget


def _check_plan(config: RunConfig, budget: Budget, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a plan that no other run could train, whichever modules stay."""
    rank = highest_rank(budget.costs, budget.final, config.pruning.modules_per_layer)
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    if rank > min(shapes[narrowest]):
        raise ValueError(
            f"pruning.modules_per_layer is {config.pruning.modules_per_layer} and adapter.target_rank is "
            f"{config.adapter.target_rank}, so that a module that stays may be planned a rank of {rank}, but "
            f"{narrowest} can have {min(shapes[narrowest])} at most: keep more modules, lower adapter.target_rank, or "
            "leave that layer out of adapter.target_modules"
        )


def _key_of_slots(adapter: DynamicLoraConfig) -> str:
    """What decides how many components a layer has room for."""
    if adapter.slots is not None:
        return "adapter.slots"
    return "adapter.initial_rank" + ("" if adapter.initial_rank else " (1.5 x adapter.target_rank by default)")


def _check_adapter_dtype(config: RunConfig, compute_dtype: str) -> None:
    """Refuse a dtype that the engine would change, or in which updates would be lost."""
    dtype, engine = config.adapter.dtype, config.distributed.engine
    if engine.startswith("zero"):
        if dtype not in ("auto", compute_dtype):
            raise ValueError(
                f"adapter.dtype is {dtype}, but DeepSpeed casts all parameters to the compute dtype {compute_dtype} "
                "(and keeps a float32 master copy): leave it at auto"
            )
    elif dtype == "bfloat16":
        raise ValueError(
            f"adapter.dtype is {dtype}, but distributed.engine {engine} keeps no float32 master copy, so that updates "
            "too small for 16 bits, such as those of a gate near 1, would be lost: set adapter.dtype to auto, which is "
            "float32 here"
        )


def _check_head_dtype(config: RunConfig, compute_dtype: str) -> None:
    """A trained head has the adapter's dtype. Without a cast of its own, it reads what the base computes, which torch's
    autocast brings together with float32 weights, but not with others."""
    if config.model.fuse or not TASKS[config.task].trains_head:
        return
    if config.adapter.dtype not in ("auto", "float32", compute_dtype):
        raise ValueError(
            f"adapter.dtype is {config.adapter.dtype}, but model.fuse is false, so that the head must read the compute "
            f"dtype {compute_dtype} as it is: set adapter.dtype to auto, or model.fuse to true"
        )


def check_context(skeleton: PreTrainedModel, data: RunData) -> None:
    """Refuse examples that are longer than the model's context, beyond which its positions mean nothing.

    Raises:
        ValueError: names the longest example's source.
    """
    context = context_of(skeleton)
    for source in (*data.train, *data.evaluation):
        columns = [name for name in ("input_ids", "labels") if name in source.dataset.column_names]
        longest = max(int(source.lengths(name).max()) for name in columns)
        if context is not None and longest > context:
            raise ValueError(
                f"the longest example of {source.name} has {longest} tokens, more than the model's context of "
                f"{context} (max_position_embeddings): set data.max_length to {context} or less, and data.overlong to "
                "drop or truncate (the same goes for data.max_target_length)"
            )


def check_vocabulary(skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> list[str]:
    """Refuse tokens for which the model's embedding has no row, where the data or the padding has them.

    Some models are published with such a token, for images say, which no text has (Gemma 3 1B).

    Returns:
        A remark on tokens that could come up later, in a prompt.

    Raises:
        ValueError: names token, number and rows.
    """
    rows = input_embedding(skeleton).num_embeddings
    names = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not names:
        return []
    found = [("the padding token", tokenizer.pad_token_id)]
    for kind, sources in (("training", data.train), ("held-out", data.evaluation)):
        for source in sources:
            for column in ("input_ids", "labels"):
                if column in source.dataset.column_names:
                    found.append((f"a token in {column} of the {kind} data of {source.name}", source.largest(column)))
    for what, number in found:
        if number is not None and number >= rows:
            raise ValueError(
                f"{what} is {names.get(number)!r} with the number {number}, but the model's embedding has {rows} rows "
                f"(0 to {rows - 1}): tokenizer and weights at model.path do not belong together; take the tokenizer "
                "that the weights came with, or a model whose embedding has been resized for it"
            )
    first = min(names)
    return [
        f"the tokenizer has {len(names)} tokens such as {names[first]!r} ({first}) for which the model's embedding, of "
        f"{rows} rows, has none; no example has one, and no prompt may"
    ]


def context_of(skeleton: PreTrainedModel) -> int | None:
    """Tokens of the longest row that the model has positions for; None where there is no bound.

    Models of the RoBERTa family count from behind their padding token, so that some positions are never used.
    """
    context = positions_of(skeleton.config)
    for name, module in skeleton.named_modules():
        unused = getattr(module, "padding_idx", None)
        if context is not None and name.endswith("position_embeddings") and unused is not None:
            return int(context - unused - 1)
    return context


def interval_for(importance: str, total_steps: int, warmup_fraction: float, final_fraction: float) -> int:
    """What ``pruning.interval: auto`` means for an importance, in optimizer steps."""
    # Only this one knows nothing at an event but the steps since the one before it.
    find = automatic_interval if importance == GATE_SENSITIVITY else twentieth_of_phase
    return find(total_steps, warmup_fraction, final_fraction)


def build_schedule(
    pruning: PruningConfig, adapter: DynamicLoraConfig, num_layers: int, total_steps: int
) -> BudgetSchedule:
    """The budget over the run: one that rises with the rule grow.

    Raises:
        ValueError: the run is too short for the phases of the pruning section.
    """
    kind = {GROW: GrowthSchedule, MODULES_PER_LAYER: OneEvent}.get(pruning.rule, BudgetSchedule)
    return kind(
        total_steps=total_steps,
        num_layers=num_layers,
        initial_rank=adapter.start_rank,
        target_rank=adapter.target_rank,
        warmup_fraction=pruning.warmup_fraction,
        final_fraction=pruning.final_fraction,
        interval=interval_for(pruning.importance, total_steps, pruning.warmup_fraction, pruning.final_fraction)
        if pruning.interval == "auto"
        else pruning.interval,
    )
