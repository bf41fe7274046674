"""transformers' Trainer with the method hooked in; other modules make the decisions.

``tests/unit/training/test_trainer_overrides.py`` pins the private methods of the Trainer that are overridden here.
"""

import time
from collections.abc import Sized
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.random import set_seed
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import DefaultFlowCallback, PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.recomputation import recompute_first
from dora_dist.console.text import say
from dora_dist.data.batches import Collator, Example, PlannedRows
from dora_dist.distributed.engine import Moments, SkippedSteps
from dora_dist.distributed.out_of_memory import explained
from dora_dist.distributed.world import buffer_dtypes, check_prepared, set_engine_timeout
from dora_dist.method.prune_event import PruneEvent
from dora_dist.page.document import keep_current
from dora_dist.runs import checkpoint
from dora_dist.runs.records import BEST_STEP, RecordedEvent
from dora_dist.training.batch_size import global_batch
from dora_dist.training.checkpointing import Checkpointer
from dora_dist.training.from_data.ranks import choose_ranks
from dora_dist.training.from_data.start import start_from_data
from dora_dist.training.gradient_watch import GradientWatch
from dora_dist.training.optimizer_shards import OptimizerShards
from dora_dist.training.out_of_memory import step_advice
from dora_dist.training.parts import LoopSettings, TrainingParts, TrainingRows
from dora_dist.training.step_log import StepLog

EQUILIBRIUM, BALANCE = "equilibrium_penalty", "balance_loss"
"""Names in the log of the loss terms other than the task loss."""
KEPT_LOGS = 20
"""Number of log lines kept in the Trainer's state, where :meth:`DynamicLoraTrainer.owes_evaluation` needs those of one
step."""


class DynamicLoraTrainer(Trainer):
    """Adds the equilibrium penalty, drives the controller after every optimizer step, and seals checkpoints.

    Args:
        parts: the objects that the loop works with.
        settings: settings of the loop.
        rows: the sizes of the rows of ``train_dataset``, which are in the order of training.
        kwargs: further arguments of the Trainer.

    Attributes:
        preempted: whether training ended before its last step, with a checkpoint, because a rank was told to stop.
        evaluated_step: number of optimizer steps taken before the last evaluation; None before the first.

    Raises:
        ValueError: the model cannot be trained with the same result on any number of ranks.
    """

    model: DynamicLoraModel

    def __init__(self, *, parts: TrainingParts, settings: LoopSettings, rows: TrainingRows, **kwargs: Any) -> None:
        evaluator = parts.evaluator
        # The Trainer's own evaluation is replaced by :meth:`evaluate`; the Trainer only has to know that there are
        # data.
        sources = None if evaluator is None else evaluator.sources
        # transformers' type has no mapping of datasets of this kind.
        super().__init__(eval_dataset=sources, **kwargs)  # type: ignore[arg-type]
        self.parts = parts
        self.settings = settings
        self.rows = rows
        self.preempted = False
        self.evaluated_step: int | None = None
        self.begun_step = 0
        self.skipped_steps: SkippedSteps
        self.checkpointer: Checkpointer
        self._loss_before: Tensor  # the Trainer's sum since the previous line, before the latest step
        self._buffer_dtypes = buffer_dtypes(self.model)
        weights = {EQUILIBRIUM: settings.equilibrium_weight}
        if parts.balance is not None:
            weights[BALANCE] = settings.balance_weight
        self.step_log = StepLog(parts.controller, parts.skip_policy, weights, self.args.device, self.tokens_of)
        self._gradient_watch: GradientWatch | None = None
        self._resumed_from: Path | None = None
        self._first_step = 0
        self._choose_loss_scale()
        parts.trackers.attach(self.callback_handler.callbacks)
        self.add_callback(_MethodCallback(self))

    def _choose_loss_scale(self) -> None:
        """Tell the Trainer who divides the loss by the number of targets, and by the accumulation steps."""
        if self.parts.row_losses is not None:
            # The loss is a mean over the rows of a micro-batch. All micro-batches have the same number of rows, so that
            # it is divided by the accumulation steps like the penalty (in compute_loss), and the engine takes the mean
            # over ranks.
            self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, True
            if not hasattr(Trainer, "loss_is_scaled_for_ga"):
                # transformers before 5.19 divides once more unless there is such a function, which is never called.
                self.compute_loss_func = self.parts.row_losses
        elif self.compute_loss_func is not None:
            self.model_accepts_loss_kwargs = False  # the Trainer passes the count to the function, not to the model
        elif not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"the model class {type(self.model.get_base_model()).__name__} does not take num_items_in_batch, so "
                "that its loss would depend on the number of ranks and on gradient accumulation"
            )

    def train(self, resume_from_checkpoint: str | bool | Path | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        assert resume_from_checkpoint is not True, "a path is wanted: which checkpoint to use is decided elsewhere"
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        # Every rank has dropout of its own; a resumed run restores each rank's generators from its checkpoint.
        set_seed((self.args.seed + self.args.process_index) % 2**32)
        started = time.monotonic()
        if self._resumed_from is None:
            self._prepare_from_data()
        self.parts.agreement.note("starting the engine")
        with explained(self._advice_on_memory):
            result = super().train(str(self._resumed_from) if self._resumed_from else None, *args, **kwargs)
        tokens = self.tokens_of(self._first_step, self.state.global_step)
        seconds = time.monotonic() - started
        self.parts.records.metrics(self.state.global_step, {"session_seconds": seconds, "session_tokens": tokens})
        return result

    def _prepare_from_data(self) -> None:
        """Choose the ranks and compute the start, where they are made from training rows."""
        agreement, controller = self.parts.agreement, self.parts.controller
        choice, data_start = self.settings.rank_choice, self.settings.data_start
        if choice is not None or data_start is not None:
            # Here, because the Trainer switches it on only later.
            recompute_first(self.model.get_base_model(), self.settings.recomputation.count)
        if choice is not None:
            ranks = choose_ranks(self.model, self._loss_of_row, choice, controller.budget, agreement)
            controller.fix_ranks(ranks)
        if data_start is not None:
            start_from_data(self.model, self._loss_of_row, data_start, agreement)

    def tokens_of(self, first: int, last: int) -> int:
        """Number of tokens of the optimizer steps after ``first`` up to ``last``, on all ranks together, without
        padding."""
        rows = global_batch(self.args, self.args.world_size)
        return int(self.rows.lengths[first * rows : last * rows].sum())

    def _advice_on_memory(self) -> str:
        rows, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        return step_advice(self.state.global_step + 1, self.settings.recomputation, rows, accumulation)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group, or two where the columns b_i have a learning rate of their own. The Trainer would add an
        empty group for parameters without weight decay, on which DeepSpeed's step fails under torch 2.13 (a strict zip
        over groups)."""
        if self.optimizer is None:
            # The Trainer takes models of PEFT too, which the type leaves out.
            adapted = cast(PreTrainedModel, self.model)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            groups = [{"params": parameters, "weight_decay": self.args.weight_decay}]
            ratio = self.settings.lora_plus_ratio
            if ratio != 1:
                columns = {id(layer.lora_b) for layer in self.parts.controller.layers.values()}
                groups = [
                    {**groups[0], "params": [one for one in parameters if id(one) not in columns]},
                    {**groups[0], "params": [one for one in parameters if id(one) in columns]},
                ]
                groups[1]["lr"] = self.args.learning_rate * ratio
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Task loss plus the penalty and, with routing, the balancing loss. Each enters once per optimizer step,
        whatever the accumulation: each of the micro-batches carries its share, and the mean over the ranks leaves it as
        it is."""
        loss, outputs = self._task_loss(model, inputs, num_items_in_batch)
        if self.parts.row_losses is not None:
            loss = loss / self.current_gradient_accumulation_steps
        if self.model.training:
            penalty = self.parts.controller.penalty() if self.settings.equilibrium_weight else None
            balance = None if self.parts.balance is None else self.parts.balance()
            for name, term in ((EQUILIBRIUM, penalty), (BALANCE, balance)):
                if term is not None:
                    share = term / self.current_gradient_accumulation_steps
                    loss = loss + self.step_log.add(name, share).to(loss.dtype)
            loss = self.parts.skip_policy.guard(loss)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Any]:
        """The task loss, and the model's output. The loss is a mean over the rows for a task with one target a row,
        otherwise a sum over tokens divided by their number in the global batch, as the Trainer computes it."""
        if self.parts.row_losses is None:
            return cast(tuple[Tensor, Any], super().compute_loss(model, inputs, True, num_items_in_batch))
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return self.parts.row_losses(outputs, inputs).mean(), outputs

    def _loss_of_row(self, number: int) -> Tensor:
        assert isinstance(self.train_dataset, PlannedRows)
        return self.loss_of(self.train_dataset[number])

    def loss_of(self, row: list[Example]) -> Tensor:
        """Task loss of a row: a sum over its targets, times a constant of the run."""
        collate = cast(Collator, self.data_collator)  # transformers' type knows no rows of several examples
        batch = self._prepare_inputs(collate([row]))
        return self._task_loss(self.model, batch, torch.ones((), device=self.args.device))[0]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss and metrics by an :class:`~dora_dist.evaluation.evaluator.Evaluator`, logged as ``eval_*``."""
        assert self.parts.evaluator is not None, "evaluation was asked for without held-out data"
        metrics = {f"eval_{name}": value for name, value in self.parts.evaluator(self.model).items()}
        self.log(dict(metrics))
        self.parts.records.answers(self.state.global_step, self.parts.evaluator.shown)
        if self.parts.agreement.is_first:
            keep_current(self.parts.records.folder)
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._follow_best(metrics)
        return metrics

    def _follow_best(self, metrics: dict[str, float]) -> None:
        """Record an evaluation for ``evaluation.keep_best``, and end the run if none has been better for long enough.
        All ranks decide the same, because they have the same figures."""
        best, step = self.parts.best, self.state.global_step
        if best is None:
            return
        best.after_evaluation(step, {name.removeprefix("eval_"): value for name, value in metrics.items()})
        if best.has_waited_long_enough and step < self.state.max_steps:
            self.control.should_training_stop = True
            say(
                f"evaluation.early_stopping: no better {best.rule.figure} in {best.waited} evaluations since step "
                f"{best.step}; the run ends at step {step} of {self.state.max_steps}"
            )

    def take_best(self) -> None:
        """Make the best checkpoint's adapter that of the model and record it, if a best checkpoint is to be taken.

        Raises:
            RankFailedError: the checkpoint cannot be read; on all ranks.
        """
        best = self.parts.best
        if best is None:
            return
        if best.step is None:
            say(f"evaluation.keep_best: no {best.rule.figure} was a number; the last adapter is taken")
            return
        if best.step != self.state.global_step:
            self.checkpointer.load_best()
        found = {BEST_STEP: best.step, "best_figure": best.rule.figure}
        self.parts.records.metrics(self.state.global_step, found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a line and pass it on. ``loss`` is the task loss, comparable with that of a run without the penalty,
        which has its own key; steps that were skipped are not in it."""
        step = self.state.global_step
        # In the Trainer's summary at the end. In a resumed run: a sum since the resume, divided by all steps of the
        # run.
        logs.pop("train_loss", None)
        # The Trainer's guess from the number of parameters, as which it counts 4-bit codes in shards.
        logs.pop("total_flos", None)
        logs["epoch"] = step * global_batch(self.args, self.args.world_size) / self.rows.per_epoch
        # The Trainer overwrites it with the share of the run that is done, because the run is one long epoch to it.
        self.state.epoch = logs["epoch"]
        extra: dict[str, Any] = {}
        if "loss" in logs:
            self.step_log.complete(logs, step)
            extra["allocation"] = self.parts.controller.allocation_digest()
            say(self.step_log.progress(logs, step, self.state.max_steps))
        self.parts.records.metrics(step, {**logs, **extra})
        super().log(logs, start_time)
        # All of it is in metrics.jsonl; the Trainer would keep it in memory, and write it into every checkpoint again.
        del self.state.log_history[:-KEPT_LOGS]

    def begin_training(self, control: TrainerControl) -> None:
        """Check what the engine has made of the model, and take over from a checkpoint if there is one.

        Raises:
            RankFailedError: a rank is not prepared as configured, or could not read the checkpoint; on all ranks.
            DisagreementError: the ranks do not hold the same adapter.
        """
        parts, settings, shards = self.parts, self.settings, None
        check_prepared(parts.agreement, self, settings.engine, settings.adapter_dtype, self._buffer_dtypes)
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        assert self.lr_scheduler is not None
        self.skipped_steps = SkippedSteps(self.model_wrapped, self.optimizer.optimizer)
        parts.controller.attach(Moments(self.model_wrapped, self.optimizer.optimizer))
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if self.is_deepspeed_enabled:
            set_engine_timeout(settings.timeout_minutes)
            shards = OptimizerShards(self.model_wrapped, trained, parts.agreement)
        self.checkpointer = Checkpointer(parts, settings, self.optimizer, self.lr_scheduler, shards, trained)
        if self._resumed_from is None:
            parts.controller.verify("the adapter at the start")
            self._gradient_watch = GradientWatch(parts.controller.layers)
            self._record(parts.controller.before_first_step())
        else:
            self.checkpointer.restore(self._resumed_from)
            if self.owes_evaluation():
                self.evaluate()
            control.should_training_stop = parts.best is not None and parts.best.has_waited_long_enough
        self._first_step = self.begun_step = self.state.global_step
        self.step_log.start_clock(self._first_step)

    def begin_step(self) -> None:
        """Announce the step, and keep what a skipped step must not change."""
        self.begun_step = self.state.global_step + 1
        self.parts.agreement.note(f"forward, backward and update of step {self.begun_step}")
        self.parts.skip_policy.begin_step()
        self.step_log.begin_step()
        self._loss_before = self._tr_loss.clone()

    def end_step(self, control: TrainerControl) -> None:
        """What follows an optimizer step, before it is logged and saved.

        Raises:
            ValueError: no gradient has come to a layer in the first step; on all ranks.
            NonFiniteLossError: too many consecutive steps were skipped; on all ranks.
            RankFailedError: a rank has failed; on all ranks.
            DisagreementError: a pruning event was due and the ranks hold different adapters; on all ranks.
        """
        if self._gradient_watch is not None:
            self._gradient_watch.check(self.parts.agreement)
            self._gradient_watch = None
        self.account_for_skipping()
        if not self.parts.skip_policy.last:
            self.checkpointer.check_optimizer_once()
        self._record(self.parts.controller.after_optimizer_step(self.state.global_step))
        self.stop_early(control)

    def _record(self, event: PruneEvent | None) -> None:
        if event is not None:
            self.parts.records.event(event)
            initial_rank = self.settings.fingerprint.initial_rank
            self.parts.trackers.show_ranks(RecordedEvent.of(event).ranks, initial_rank, event.step)

    def account_for_skipping(self) -> None:
        """If all ranks have skipped the step just taken, because its loss or gradients were not finite, report that,
        and end the run after too many such steps in a row.

        Raises:
            NonFiniteLossError: too many consecutive steps were skipped; on all ranks.
        """
        step = self.state.global_step
        why = self.parts.skip_policy.after_step(step, self.skipped_steps.last())
        if why is None:
            return
        self.step_log.forget_step()
        self._tr_loss.copy_(self._loss_before)
        if self.accelerator.optimizer_step_was_skipped:
            assert self.lr_scheduler is not None
            self.lr_scheduler.step()  # the Trainer omits this, under DeepSpeed only; a skipped step is a step
        self.parts.records.metrics(step, {"skipped": why})
        assert self.args.output_dir is not None
        self.parts.skip_policy.check(step, why, checkpoint.newest(Path(self.args.output_dir)))

    def stop_early(self, control: TrainerControl) -> None:
        """End training after this optimizer step if any rank cannot go on or was told to stop. All ranks decide
        together, by one exchange.

        Where a rank was told to stop, training ends with a checkpoint. What was measured since the last log is logged.
        An evaluation that is due is left to the run that resumes from here (:meth:`owes_evaluation`), because the time
        until the deadline belongs to the checkpoint.

        Raises:
            RankFailedError: a rank could not score its components; on all ranks.
        """
        failure, told = self.parts.controller.failure, self.parts.notice.received is not None
        if not self.parts.agreement.any(told or failure is not None):
            return
        step = self.state.global_step
        self.parts.agreement.raise_together(failure, f"scoring components by step {step}")
        if step < self.state.max_steps:
            self.preempted = True
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def owes_evaluation(self) -> bool:
        """Whether an evaluation was due at the step that a resumed run starts from, and was not made."""
        due = DefaultFlowCallback().on_step_end(self.args, self.state, TrainerControl()).should_evaluate
        done = (line["step"] for line in self.state.log_history if "eval_loss" in line)
        return due and self.state.global_step not in done

    @wraps(Trainer._run_epoch)
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Do nothing if a resumed run was stopped early: the Trainer would notice only after another step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset))  # its length is known

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare without a checkpoint: :meth:`Checkpointer.restore` reads it, in the same order for every engine."""
        # transformers has no types for it.
        return super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """With a sharded base, put DDP around the model here, because accelerate refuses to."""
        wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
        shards = self.parts.agreement.sharded_base
        return wrapped if shards is None else shards.wrap(wrapped, self.accelerator)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Left to :meth:`Checkpointer.restore`: the adapter that the Trainer would read is folded for PEFT."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.checkpointer.restore_random_states(self.args.seed, partial(super()._load_rng_state, checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpointer.save(self.state.global_step, partial(super()._save_checkpoint, model, trial))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Left to :meth:`Checkpointer.save`: the Trainer would write DeepSpeed's format."""


class _MethodCallback(TrainerCallback):
    """Calls the method's code from the Trainer's loop."""

    def __init__(self, trainer: DynamicLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_training(control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step(control)
