"""The configuration of a run: one YAML, typed and strict, with ``--section.key value`` on top of it.

Values that cannot work are refused here, before any process group, data or model is touched.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dora_dist.config.adapter import PROMPT, RANKS_FROM_DATA, UNIFORM, DynamicLoraConfig
from dora_dist.config.checks import require
from dora_dist.config.data import DataConfig
from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.config.model import ModelConfig
from dora_dist.config.presets import PAPER, PresetName
from dora_dist.config.pruning import (
    FILL_SLOTS,
    GROW,
    MODULES_PER_LAYER,
    MOVE,
    NONE,
    PruningConfig,
    check_prunes,
    check_slots,
)
from dora_dist.config.tasks import CAUSAL_LM, EXACT_MATCH, TASKS, TaskName, metrics_of
from dora_dist.config.training import CHECKPOINTING, DEFAULT_TRAINING_ARGUMENTS, check_training_section, with_strategies
from dora_dist.config.unused import check_used

LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""
ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Those of transformers whose state is floating-point numbers for each entry of a parameter, or nothing."""
UNSPLITTABLE = {
    "8bit": "keeps its state in blocks of 8 bits with constants of their own",
    "4bit": "keeps its state in blocks of 4 bits with constants of their own",
    "paged": "keeps its state in memory that only it can page, and not after a resume",
}
"""Part of an optimizer's name -> why ZeRO's checkpoints cannot hold its state for any number of ranks."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured on the held-out data.

    Args:
        before: also evaluate before the first step.
        exact_match: generate answers greedily and count those that equal the reference.
        max_new_tokens: length limit of a generated answer, in tokens.
        max_examples: number of examples of every held-out source to evaluate, the first ones (of SQuAD, questions);
            null for all.
        num_beams: number of beams for generated summaries; 1 is greedy.
        metrics: figures beside the loss; null for the defaults of the task. For causal_lm: final_number (generate
            answers greedily and count those whose last number is that of the reference); for classes: accuracy,
            matthews, f1 (of the second of two classes); for regression: pearson, spearman; for question_answering:
            exact_match, f1; for summaries: rouge1, rouge2, rouge_l.
        keep_best: held-out figure by which the best checkpoint is found, such as loss, exact_match, or SOURCE_loss of
            one of several sources. That checkpoint is kept, and its adapter is that of the run; docs/evaluate.md says
            which evaluations count. null ends with the last adapter.
        early_stopping: number of evaluations that count for keep_best, in a row and none of them better, after which
            the run ends; null for never.
    """

    before: bool = True
    exact_match: bool = False
    max_new_tokens: int = 256
    max_examples: int | None = None
    num_beams: int = 1
    metrics: list[str] | None = None
    keep_best: str | None = None
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "evaluation.max_new_tokens", self.max_new_tokens, "be at least 1")
        require(self.num_beams >= 1, "evaluation.num_beams", self.num_beams, "be at least 1")
        most = self.max_examples
        require(most is None or most >= 1, "evaluation.max_examples", most, "be at least 1, or null for all")
        patience = self.early_stopping
        require(patience is None or patience >= 1, "evaluation.early_stopping", patience, "be at least 1, or null")
        if patience is not None and self.keep_best is None:
            raise ValueError(
                f"evaluation.early_stopping is {patience}, but evaluation.keep_best is null, which names the figure "
                "that must get better: set it to loss, say"
            )

    @property
    def asks(self) -> str:
        """The key, with its value, for which a run of causal_lm generates answers; for messages."""
        if self.exact_match:
            return "evaluation.exact_match is true"
        return f"evaluation.metrics has {', '.join(self.metrics or [])}"


@dataclass(kw_only=True)
class DistributedConfig:
    """How the processes (ranks) work together. The launcher decides how many there are.

    Args:
        engine: zero2 (DeepSpeed ZeRO stage 2), ddp, or none (one process, no engine). The program checks that the
            launcher started this engine.
        shard_base: leave each rank only a part of the frozen base, whose layers are gathered when they are computed:
            false; true, shared by all ranks; or node, by the ranks of each node. With engine ddp, and quantization nf4
            or none; see docs/scale.md. A resumed run may change it.
        timeout_minutes: minutes that a rank waits for the others in a collective before it fails.
        join_minutes: minutes that the ranks wait for each other at the start.
        silent_seconds: seconds without a heartbeat after which the other ranks end and name the silent one. This
            detects a rank that is stopped or whose node is disconnected; a killed rank is mostly detected at once.
        max_skipped_steps: number of consecutive steps that may be skipped on all ranks because the loss or gradient of
            some rank is not finite; one more ends the run, and 0 ends it at the first one.
    """

    engine: Literal["zero2", "ddp", "none"] = "zero2"
    shard_base: bool | Literal["node"] = False
    timeout_minutes: float = 30.0
    join_minutes: float = 10.0
    silent_seconds: float = 60.0
    max_skipped_steps: int = 3

    def __post_init__(self) -> None:
        require(self.timeout_minutes > 0, "distributed.timeout_minutes", self.timeout_minutes, "be positive")
        require(self.join_minutes > 0, "distributed.join_minutes", self.join_minutes, "be positive")
        # Heartbeats come once a second, and a busy machine may delay some.
        require(self.silent_seconds >= 5, "distributed.silent_seconds", self.silent_seconds, "be at least 5")
        require(self.max_skipped_steps >= 0, "distributed.max_skipped_steps", self.max_skipped_steps, "be at least 0")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints. training.save_steps sets how often one is saved.

    Args:
        resume: auto (from the newest complete checkpoint in output_dir, if there is one), never, or the path of a
            checkpoint.
        keep_last: number of complete checkpoints to keep; older ones are deleted.
    """

    resume: str = "auto"
    keep_last: int = 2

    def __post_init__(self) -> None:
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "be at least 1")


@dataclass(kw_only=True)
class RunConfig:
    """Train a dynamic-rank LoRA adapter (Dynamic Low-Rank Adaptation, ACL 2024) on a frozen, quantized language model.

    Args:
        output_dir: folder of the run, for checkpoints, adapter, metrics and pictures.
        preset: defaults of the sections adapter and pruning, which their keys override: 2026-11 (the default of a
            configuration file: a start from training rows, and pruning in the first tenth of the run by gate
            sensitivity, to a budget in parameters), paper (Dynamic Low-Rank Adaptation as published), or lora (plain
            LoRA, without gates or pruning).
        task: causal_lm (instruction tuning), sequence_classification (classes, or regression), question_answering
            (parts of a text), or seq2seq (summaries, by an encoder and a decoder).
        seed: random seed of the data order, the adapter's initial values and dropout.
        model: the frozen base: where it is, and how it is read and computed.
        adapter: the adapter at its start: ranks, scale, modules.
        pruning: how components are scored and removed.
        data: rows for training and held-out rows, and how they become examples.
        evaluation: figures on the held-out rows.
        distributed: engine and time-outs of the ranks.
        checkpoint: how the run resumes, and how many checkpoints it keeps.
        training: fields of transformers.TrainingArguments, such as learning_rate, num_train_epochs or max_steps,
            per_device_train_batch_size, gradient_accumulation_steps, logging_steps, save_steps.
        format_version: format of this file. A run writes it into its config.yaml; do not set it in your own.
    """

    output_dir: str
    model: ModelConfig
    data: DataConfig
    preset: PresetName = PAPER
    task: TaskName = "causal_lm"
    seed: int = 0
    adapter: DynamicLoraConfig = field(default_factory=lambda: DynamicLoraConfig(dtype="auto"))
    pruning: PruningConfig = field(default_factory=PruningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        known = 1 <= self.format_version <= FORMAT_VERSION
        require(known, "format_version", self.format_version, f"lie between 1 and {FORMAT_VERSION}: leave it out")
        require(bool(self.output_dir.strip()), "output_dir", repr(self.output_dir), "name a folder")
        self.output_dir = os.path.expanduser(self.output_dir)
        for name, seed in (("seed", self.seed), ("adapter.seed", self.adapter.seed)):
            require(seed is None or 0 <= seed <= LARGEST_SEED, name, seed, f"lie between 0 and {LARGEST_SEED}")
        self.training = with_strategies(self.training)
        check_training_section(self.training)
        given = [name for name in self.training if name.removesuffix("_kwargs") in CHECKPOINTING]
        if given and self.model.recompute_layers is not None:
            raise ValueError(
                f"training.{given[0]} is {str(self.training[given[0]]).lower()} and model.recompute_layers is "
                f"{self.model.recompute_layers}, which decide the same: leave training.{given[0]} out"
            )
        self._check_task()
        self._check_rule()
        check_used(self)
        self._check_sharding()
        self._check_optimizer()
        if self.evaluation.exact_match and not self.data.train_on_thoughts:
            raise ValueError(
                "evaluation.exact_match is true, but data.train_on_thoughts is false: exact match compares answers "
                "with their thoughts, which are not learned; set evaluation.metrics to final_number, or leave it out"
            )
        if self.task == CAUSAL_LM and self.measured and self.data.eval is None:
            raise ValueError(f"{self.evaluation.asks}, but there is no held-out data: set data.eval")
        if self.evaluation.keep_best is not None and self.data.eval is None:
            raise ValueError(
                f"evaluation.keep_best is {self.evaluation.keep_best}, but there is no held-out data: set data.eval"
            )
        if self.adapter.routing == PROMPT:
            self.model = replace(self.model, fuse=False)  # what is fused computes all modules for all rows

    def _check_sharding(self) -> None:
        """Refuse what no base can be sharded with."""
        if not self.distributed.shard_base:
            return
        given = f"distributed.shard_base is {str(self.distributed.shard_base).lower()}"
        for key, value, works, advice in (
            ("distributed.engine", self.distributed.engine, self.distributed.engine == "ddp", "set it to ddp"),
            ("model.quantization", self.model.quantization, self.model.quantization != "int8", "set it to nf4 or none"),
            ("adapter.routing", self.adapter.routing, self.adapter.routing != PROMPT, "leave it out"),
            ("adapter.new_tokens", self.adapter.new_tokens, self.adapter.new_tokens is None, "leave it out"),
        ):
            if not works:
                raise ValueError(f"{given}, but {key} is {value}, with which no base can be sharded: {advice}")

    def _check_rule(self) -> None:
        """Refuse keys that do not fit the rule, and set ``initial_rank`` and ``slots`` where it decides them."""
        if self.pruning.rule == MODULES_PER_LAYER and self.adapter.initial_rank is None:
            self.adapter = replace(self.adapter, initial_rank=self.adapter.target_rank)
        if self.adapter.ranks in RANKS_FROM_DATA:
            self._prepare_ranks_from_data()
        self._check_slots()
        if self.pruning.rule == NONE:
            if self.adapter.initial_rank not in (None, self.adapter.target_rank):
                raise ValueError(
                    f"pruning.rule is none, so that ranks stay what they are, but adapter.initial_rank is "
                    f"{self.adapter.initial_rank} and adapter.target_rank is {self.adapter.target_rank}: leave "
                    "adapter.initial_rank out, or set pruning.rule to prune"
                )
            self.adapter = replace(self.adapter, initial_rank=self.adapter.target_rank)
            return
        if self.adapter.routing == PROMPT:
            raise ValueError(
                f"adapter.routing is {PROMPT}, under which all components are needed, but pruning.rule is "
                f"{self.pruning.rule}: set it to none (preset: lora does)"
            )
        if self.pruning.rule == GROW and self.adapter.ranks == UNIFORM:
            start, target = self.adapter.initial_rank or 1, self.adapter.target_rank
            self.adapter = replace(self.adapter, initial_rank=start, slots=self.adapter.slots or 2 * target)
            least = f"be less than adapter.target_rank, {target}, to which the rule {GROW} grows"
            require(start < target, "adapter.initial_rank", start, least)
        check_prunes(self.pruning, self.adapter)

    def _prepare_ranks_from_data(self) -> None:
        """Give ranks from data their slots, and a budget that is counted in parameters."""
        if self.adapter.routing == PROMPT:
            raise ValueError(
                f"adapter.routing is {PROMPT}, but adapter.ranks is {self.adapter.ranks}, which is made for modules "
                "that see all rows: set it to uniform"
            )
        if self.adapter.slots is None:
            self.adapter = replace(self.adapter, slots=2 * self.adapter.target_rank)
        self.pruning = replace(self.pruning, budget_unit="parameters")

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured on the held-out data beside the loss: names of
        :data:`~dora_dist.config.tasks.METRICS`."""
        exact_match = (EXACT_MATCH,) if self.evaluation.exact_match else ()
        return (*exact_match, *metrics_of(self.task, self.data.labels, self.evaluation.metrics))

    @property
    def _optim(self) -> str:
        return str({**DEFAULT_TRAINING_ARGUMENTS, **self.training}["optim"])

    def _check_optimizer(self) -> None:
        """Refuse what ZeRO could not save: otherwise the run would end after its first step."""
        reason = next((why for part, why in UNSPLITTABLE.items() if part in self._optim), None)
        if self.distributed.engine == "zero2" and reason is not None:
            raise ValueError(
                f"training.optim is {self._optim}, which {reason}, but distributed.engine is zero2, whose checkpoints "
                "split the state among any number of ranks: set training.optim to adamw_torch (ZeRO divides its state "
                "by the ranks already, and an adapter's is small), or distributed.engine to ddp"
            )

    def _check_slots(self) -> None:
        """Refuse slots, initial ranks and optimizers that the rule cannot use."""
        adapter, rule, optim = self.adapter, self.pruning.rule, self._optim
        if rule == MOVE and adapter.slots is None:
            raise ValueError(
                f"pruning.rule is {rule}, which needs slots for new components, but adapter.slots is null: set it to "
                f"{2 * adapter.target_rank}, say, twice adapter.target_rank"
            )
        check_slots(self.pruning, adapter)
        if rule in (MOVE, MODULES_PER_LAYER) and adapter.start_rank != adapter.target_rank:
            raise ValueError(
                f"adapter.initial_rank is {adapter.start_rank}, but pruning.rule is {rule}, which starts at "
                f"adapter.target_rank, {adapter.target_rank}: leave it out"
            )
        if rule in FILL_SLOTS and optim not in ELEMENTWISE_OPTIMIZERS:
            raise ValueError(
                f"training.optim is {optim}, but pruning.rule is {rule}, which needs the optimizer's state to be "
                f"one number for each entry: set it to one of {', '.join(ELEMENTWISE_OPTIMIZERS)}"
            )

    def _check_task(self) -> None:
        task, data = TASKS[self.task], self.data
        metrics_of(self.task, data.labels, self.evaluation.metrics)
        for name in (data.format, *(source.format for source in (*data.train_sources, *data.eval_sources))):
            if name != "auto" and name not in task.formats:
                fitting = next(other.name for other in TASKS.values() if name in other.formats)
                raise ValueError(
                    f"the format {name} is for the task {fitting}, but task is {self.task}, with the formats "
                    f"{', '.join(task.formats)}"
                )
        if data.labels == "regression" and not task.has_labels:
            labelled = " or ".join(other.name for other in TASKS.values() if other.has_labels)
            raise ValueError(f"data.labels is regression, but task is {self.task}: set it to {labelled}")
        if self.task == CAUSAL_LM:
            return
        self._check_plain_rows()
        for key, value, left_out in (
            ("data.batching", data.batching, data.batching != "packed"),
            ("data.train_on", data.train_on, data.train_on == "assistant"),
            ("data.chat_template", data.chat_template, data.chat_template == "auto"),
            ("data.chat_template_kwargs", data.chat_template_kwargs, not data.chat_template_kwargs),
            ("data.train_on_thoughts", "false", data.train_on_thoughts),
            ("adapter.routing", self.adapter.routing, self.adapter.routing != PROMPT),
            ("adapter.new_tokens", self.adapter.new_tokens, self.adapter.new_tokens is None),
            ("evaluation.exact_match", "true", not self.evaluation.exact_match),
        ):
            if not left_out:
                raise ValueError(f"{key} is {value}, which is for the task {CAUSAL_LM}, but task is {self.task}")

    def _check_plain_rows(self) -> None:
        """Refuse keys that put something around the texts of rows, which only causal_lm does."""
        parts = {"train": self.data.train_sources, "eval": self.data.eval_sources}
        placed = {f"data.{part}[{n}]": source for part, sources in parts.items() for n, source in enumerate(sources)}
        for place, section in {"data": self.data, **placed}.items():
            for name in ("prompt", "system", "as_chat"):
                value = getattr(section, name)
                if value is not None:
                    shown = str(value).lower() if isinstance(value, bool) else repr(value)
                    raise ValueError(
                        f"{place}.{name} is {shown}, which is for the task {CAUSAL_LM}, but task is {self.task}: leave "
                        "it out"
                    )
