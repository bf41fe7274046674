"""transformers' Trainer with the method hooked in; everything it decides is decided elsewhere."""

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import SCHEDULER_NAME

from dora_dist.base_model.losses import RowLosses
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import SkippedSteps
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.distributed.world import check_prepared, set_engine_timeout
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.runs import checkpoint
from dora_dist.runs.checkpoint import read_method_state
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.records import RunRecords
from dora_dist.training import method_state
from dora_dist.training.batch_size import global_batch
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.optimizer_shards import OptimizerShards
from dora_dist.training.skipped_steps import SkipPolicy

KEPT_LOGS = 20
"""Lines of the log in the Trainer's state, where :meth:`DynamicLoraTrainer.owes_evaluation` needs those of one step."""


class DynamicLoraTrainer(Trainer):
    """Adds the equilibrium penalty, drives the controller after every optimizer step, and seals checkpoints.

    Args:
        controller: of the method.
        agreement: collectives over the ranks.
        records: of the run.
        evaluator: for held-out data, or None.
        notice: of this rank's preemption.
        row_lengths: tokens of every row of ``train_dataset``, whose order is that of training.
        rows_per_epoch: rows that one pass over the data fills.
        engine: ``distributed.engine`` of the configuration.
        timeout_minutes: how long a rank waits for the others in a collective of the engine.
        adapter_dtype: what the adapter's parameters must have at step 0.
        equilibrium_weight: of the Dimensional Equilibrium Modulator in the loss.
        keep_last: complete checkpoints to keep.
        skip_policy: for steps whose loss or gradients are not finite.
        fingerprint: settings that a resumed run must not change.
        row_losses: of a task with one target a row; None where the model's own loss is taken, over tokens.

    Attributes:
        preempted: whether training ended before its last step, with a checkpoint, because a rank was told to stop.
    """

    def __init__(
        self,
        *,
        controller: DynamicRankController,
        agreement: Agreement,
        records: RunRecords,
        evaluator: Evaluator[Any] | None,
        notice: PreemptionNotice,
        row_lengths: np.ndarray,
        rows_per_epoch: int,
        engine: str,
        timeout_minutes: float,
        adapter_dtype: torch.dtype,
        equilibrium_weight: float,
        keep_last: int,
        skip_policy: SkipPolicy,
        fingerprint: Fingerprint,
        row_losses: RowLosses | None = None,
        **kwargs: Any,
    ) -> None:
        # Of its own evaluation, which :meth:`evaluate` replaces, the Trainer only wants to know that there are data.
        super().__init__(eval_dataset=None if evaluator is None else evaluator.sources, **kwargs)
        self.row_losses = row_losses
        if row_losses is not None:
            # The mean over the rows of a micro-batch, all of which have the same number of them, divided by the
            # accumulation steps like the penalty (in compute_loss); the ranks' mean is taken by the engine.
            self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, True
        elif self.compute_loss_func is not None:
            self.model_accepts_loss_kwargs = False  # the Trainer counts for the function, and must not tell the model
        elif not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"the model class {type(self.model.get_base_model()).__name__} does not take num_items_in_batch, so "
                "that its loss would depend on the number of ranks and on gradient accumulation"
            )
        self.controller = controller
        self.agreement = agreement
        self.records = records
        self.evaluator = evaluator
        self.notice = notice
        self.row_lengths = row_lengths
        self.rows_per_epoch = rows_per_epoch
        self.engine = engine
        self.timeout_minutes = timeout_minutes
        self.adapter_dtype = adapter_dtype
        self.equilibrium_weight = equilibrium_weight
        self.keep_last = keep_last
        self.fingerprint = fingerprint
        self.skip_policy = skip_policy
        self.preempted = False
        self.shards: OptimizerShards | None = None
        self.skipped_steps: SkippedSteps
        self.resumed_from: Path | None = None
        self.evaluated_step: int | None = None
        self._penalty_sum = torch.zeros((), device=self.args.device)
        self._last_log = (0, time.monotonic())
        self._first_step = 0
        self._optimizer_checked = False
        self.add_callback(_MethodCallback(self))

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        # Dropout of its own on every rank; a resumed run restores each rank's generators from its checkpoint.
        set_seed(self.args.seed, device_specific=True)
        started = time.monotonic()
        result = super().train(resume_from_checkpoint=str(self.resumed_from) if self.resumed_from else None, **kwargs)
        first, last = (step * global_batch(self.args) for step in (self._first_step, self.state.global_step))
        tokens = int(self.row_lengths[first:last].sum())
        seconds = time.monotonic() - started
        self.records.metrics(self.state.global_step, {"session_seconds": seconds, "session_tokens": tokens})
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group: the Trainer would add an empty one for parameters without weight decay, over which
        DeepSpeed's step stumbles under torch 2.13 (a strict zip over groups)."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = optimizer_class(
                [{"params": parameters, "weight_decay": self.args.weight_decay}], **options
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Task loss plus the penalty. The penalty enters once per optimizer step, whatever the accumulation: each of
        the micro-batches carries its share, and the mean over the ranks leaves it as it is."""
        if self.row_losses is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = self.row_losses(outputs, inputs).mean() / self.current_gradient_accumulation_steps
        if self.model.training:
            penalty = self.controller.penalty() if self.equilibrium_weight else None
            if penalty is not None:
                share = penalty / self.current_gradient_accumulation_steps
                self._penalty_sum += share.detach()
                loss = loss + self.equilibrium_weight * share.to(loss.dtype)
            loss = self.skip_policy.guard(loss)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss and metrics by an :class:`~dora_dist.evaluation.evaluator.Evaluator`, logged as ``eval_*``."""
        assert self.evaluator is not None, "evaluation was asked for without held-out data"
        metrics = {f"eval_{name}": value for name, value in self.evaluator(self.model).items()}
        self.log(dict(metrics))
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record and pass on. ``loss`` is the task loss, comparable with a run without the penalty, which has its own
        key; steps that were left out are not in it."""
        step = self.state.global_step
        # The Trainer's summary at the end: in a run that was resumed, a sum since then over all steps.
        logs.pop("train_loss", None)
        logs["epoch"] = step * global_batch(self.args) / self.rows_per_epoch
        # The Trainer overwrites it with the share of the run, which is one long epoch to it.
        self.state.epoch = logs["epoch"]
        extra: dict[str, Any] = {}
        if "loss" in logs:
            self._complete_training_logs(logs, step)
            extra["allocation"] = self.controller.allocation_digest()
            self._print_progress(logs, step)
        self.records.metrics(step, {**logs, **extra})
        super().log(logs, start_time)
        # All of it is in metrics.jsonl; the Trainer would keep it in memory, and write it into every checkpoint again.
        del self.state.log_history[:-KEPT_LOGS]

    def _complete_training_logs(self, logs: dict[str, float], step: int) -> None:
        steps = max(step - self._last_log[0], 1)
        taken = steps - self.skip_policy.forget_logged()
        if taken:
            penalty = float(self._penalty_sum) / taken
            logs["equilibrium_penalty"] = penalty
            logs["loss"] = logs["loss"] * steps / taken - self.equilibrium_weight * penalty
        else:
            del logs["loss"]
        self._penalty_sum.zero_()
        if self.skip_policy.last:
            logs.pop("grad_norm", None)  # it is that of the last step
        events = self.controller.events
        logs["components"] = events[-1].num_kept if events else self.controller.schedule.num_components
        now = time.monotonic()
        logs["seconds_per_step"] = (now - self._last_log[1]) / steps
        self._last_log = (step, now)

    def begin_step(self) -> None:
        """Say which step it is, and remember what a step that is left out must not change."""
        self.agreement.note(f"forward, backward and update of step {self.state.global_step + 1}")
        self.skip_policy.begin_step()
        self._sums_before = (self._tr_loss.clone(), self._penalty_sum.clone())

    def account_for_skipping(self) -> None:
        """Where all ranks have left out the step just taken, since its loss or gradients were not finite: say so, and
        end the run if that has gone on for too long.

        Raises:
            NonFiniteLossError: on all ranks.
        """
        step = self.state.global_step
        why = self.skip_policy.after_step(step, self.skipped_steps.last())
        if why is None:
            return
        for total, before in zip((self._tr_loss, self._penalty_sum), self._sums_before, strict=True):
            total.copy_(before)
        if self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()  # which the Trainer leaves out, under DeepSpeed only: a step is a step
        self.records.metrics(step, {"skipped": why})
        self.skip_policy.check(step, why, checkpoint.newest(Path(self.args.output_dir)))

    def _print_progress(self, logs: Mapping[str, float], step: int) -> None:
        left = (self.state.max_steps - step) * logs["seconds_per_step"]
        loss, norm = (logs.get(name, math.nan) for name in ("loss", "grad_norm"))  # nan: no step was taken
        say(
            f"step {step:>{len(str(self.state.max_steps))}}/{self.state.max_steps}  loss {loss:.4f}  "
            f"grad norm {norm:.3f}  lr {logs['learning_rate']:.2e}  "
            f"components {logs['components']}/{self.controller.schedule.num_components}  "
            f"{logs['seconds_per_step']:.2f} s/step  {left / 60:.1f} min left"
        )

    def start_clock(self) -> None:
        """Count time and tokens of steps from now on."""
        self._first_step = self.state.global_step
        self._last_log = (self.state.global_step, time.monotonic())

    def check_optimizer_once(self) -> None:
        """Find out after the first step taken, not in the first save, that the optimizer's state cannot be saved."""
        if self.shards is not None and not self._optimizer_checked and not self.skip_policy.last:
            self._optimizer_checked = True
            with self.agreement.together("looking at the optimizer's state"):
                self.shards.check()

    def stop_if_preempted(self, control: TrainerControl) -> None:
        """End training after this optimizer step with a checkpoint if any rank was told to stop: one decision of all.

        What was measured since the last log is logged. An evaluation that is due is left to the run that goes on from
        here (:meth:`owes_evaluation`), for the time until the deadline belongs to the checkpoint.
        """
        told = self.agreement.any(self.notice.received is not None)
        if told and self.state.global_step < self.state.max_steps:
            self.preempted = True
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def owes_evaluation(self) -> bool:
        """Whether the step that a resumed run starts from is one to evaluate, and was not."""
        due = DefaultFlowCallback().on_step_end(self.args, self.state, TrainerControl()).should_evaluate
        done = (line["step"] for line in self.state.log_history if "eval_loss" in line)
        return due and self.state.global_step not in done

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint plus the method's state, sealed when all ranks have written theirs."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.controller.verify(f"the adapter before the checkpoint of step {step}")
        with self.agreement.together(f"preparing {folder}"):
            self.controller.check_finite()
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)  # what an interrupted save left
        with self.agreement.together(f"writing {folder}"), checkpoint.room_needed(folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                method_state.save_method_state(folder, self.controller, self.fingerprint, self.agreement.size)
            mine = checkpoint.files_of_rank(folder, self.agreement.rank, self.agreement.size)
            written = checkpoint.bring_to_disk(folder, mine)
        by_rank = self.agreement.gather(written)
        with self.agreement.together(f"sealing {folder}"), checkpoint.room_needed(folder):
            if self.args.should_save:
                checkpoint.check_shards(folder, self.agreement.size, self.engine)
                checkpoint.seal(folder, {name: seen for files in by_rank for name, seen in files.items()})
                checkpoint.rotate(Path(self.args.output_dir), self.keep_last)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under ZeRO, in files from which any number of ranks can go on; otherwise the Trainer's own."""
        if self.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.shards.save(Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The Trainer's, except that a ZeRO optimizer is restored from this project's files, not from DeepSpeed's."""
        under_zero = self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if under_zero else resume_from_checkpoint
        )
        check_prepared(self.agreement, self, self.engine, self.adapter_dtype)
        self.skipped_steps = SkippedSteps(self.model_wrapped, self.optimizer.optimizer)
        if under_zero:
            set_engine_timeout(self.timeout_minutes)
            trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
            self.shards = OptimizerShards(self.model_wrapped, trained, self.agreement)
            if resume_from_checkpoint is not None:
                self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, folder: Path) -> None:
        assert self.shards is not None
        with self.agreement.together(f"loading {folder}"), checkpoint.plain_values_only(folder):
            method_state.load_adapter_parameters(folder, self.controller)
            self.shards.load(folder, read_method_state(folder)["step"])
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _load_rng_state(self, folder: str | None) -> None:
        """Each rank's generators; on another number of ranks new ones, from seed, step and rank alone."""
        if folder is None or read_method_state(Path(folder))["processes"] == self.agreement.size:
            with checkpoint.plain_values_only(folder):
                super()._load_rng_state(folder)
        else:
            fresh = np.random.SeedSequence([self.args.seed, self.state.global_step]).generate_state(1)[0]
            set_seed(int(fresh) % 2**31, device_specific=True)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        """The Trainer's, for engines other than ZeRO."""
        with checkpoint.plain_values_only(checkpoint_folder):
            super()._load_optimizer_and_scheduler(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter that a checkpoint holds for PEFT is folded; training goes on with the unfolded one."""
        method_state.load_adapter_parameters(Path(resume_from_checkpoint), self.controller)


class _MethodCallback(TrainerCallback):
    """Where the Trainer's loop meets the method."""

    def __init__(self, trainer: DynamicLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.resumed_from is not None:
            method_state.load_method_state(trainer.resumed_from, trainer.controller)
            trainer.records.truncate_after(state.global_step)
            trainer.records.replace_events(trainer.controller.events)
            if trainer.owes_evaluation():
                trainer.evaluate()
        else:
            trainer.controller.verify("the adapter at the start")
        trainer.start_clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.account_for_skipping()
        self.trainer.check_optimizer_once()
        event = self.trainer.controller.after_optimizer_step(state.global_step)
        if event is not None:
            self.trainer.records.event(event)
        self.trainer.stop_if_preempted(control)
