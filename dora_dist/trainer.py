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
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from dora_dist import checkpoint
from dora_dist.agreement import Agreement
from dora_dist.command import ExpectedRunError, say
from dora_dist.controller import DynamicRankController
from dora_dist.evaluation import Evaluator
from dora_dist.preemption import PreemptionNotice
from dora_dist.records import RunRecords
from dora_dist.world import check_prepared


def global_batch(arguments: TrainingArguments) -> int:
    """Rows of one optimizer step, over all ranks and micro-batches."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


class NonFiniteLossError(ExpectedRunError):
    """The loss or the gradient norm is NaN or infinite."""


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
        adapter_dtype: what the adapter's parameters must have at step 0.
        equilibrium_weight: of the Dimensional Equilibrium Modulator in the loss.
        keep_last: complete checkpoints to keep.
        fingerprint: what a run that resumes from this one's checkpoints must have in common with it.

    Attributes:
        preempted: whether training ended before its last step, with a checkpoint, because a rank was told to stop.
    """

    def __init__(
        self,
        *,
        controller: DynamicRankController,
        agreement: Agreement,
        records: RunRecords,
        evaluator: Evaluator | None,
        notice: PreemptionNotice,
        row_lengths: np.ndarray,
        rows_per_epoch: int,
        engine: str,
        adapter_dtype: torch.dtype,
        equilibrium_weight: float,
        keep_last: int,
        fingerprint: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        # Of its own evaluation, which :meth:`evaluate` replaces, the Trainer only wants to know that there are data.
        super().__init__(eval_dataset=None if evaluator is None else evaluator.sources, **kwargs)
        if not self.model_accepts_loss_kwargs:
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
        self.adapter_dtype = adapter_dtype
        self.equilibrium_weight = equilibrium_weight
        self.keep_last = keep_last
        self.fingerprint = fingerprint
        self.preempted = False
        self.resumed_from: Path | None = None
        self.evaluated_step: int | None = None
        self._penalty_sum = torch.zeros((), device=self.args.device)
        self._last_log = (0, time.monotonic())
        self._first_step = 0
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
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            penalty = self.controller.penalty() if self.equilibrium_weight else None
            if penalty is not None:
                share = penalty / self.current_gradient_accumulation_steps
                self._penalty_sum += share.detach()
                loss = loss + self.equilibrium_weight * share.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss and exact match by :class:`~dora_dist.evaluation.Evaluator`, logged as ``eval_*``."""
        assert self.evaluator is not None, "evaluation was asked for without held-out data"
        metrics = {f"eval_{name}": value for name, value in self.evaluator(self.model).items()}
        self.log(dict(metrics))
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record and pass on. ``loss`` is the task loss, comparable with a run without the penalty, which has its own
        key. A loss that is not finite ends the run on all ranks (the value is the same on all)."""
        step = self.state.global_step
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
        values = (logs.get("loss", 0.0), logs.get("grad_norm", 0.0))
        if not all(math.isfinite(value) for value in values):
            raise NonFiniteLossError(
                f"step {step}: loss {values[0]}, gradient norm {values[1]}; lower training.learning_rate, or look "
                "at the data of this step"
            )

    def _complete_training_logs(self, logs: dict[str, float], step: int) -> None:
        steps = max(step - self._last_log[0], 1)
        penalty = float(self._penalty_sum) / steps
        self._penalty_sum.zero_()
        logs["equilibrium_penalty"] = penalty
        logs["loss"] -= self.equilibrium_weight * penalty
        events = self.controller.events
        logs["components"] = events[-1].num_kept if events else self.controller.schedule.num_components
        now = time.monotonic()
        logs["seconds_per_step"] = (now - self._last_log[1]) / steps
        self._last_log = (step, now)

    def _print_progress(self, logs: Mapping[str, float], step: int) -> None:
        left = (self.state.max_steps - step) * logs["seconds_per_step"]
        say(
            f"step {step:>{len(str(self.state.max_steps))}}/{self.state.max_steps}  loss {logs['loss']:.4f}  "
            f"grad norm {logs.get('grad_norm', 0):.3f}  lr {logs['learning_rate']:.2e}  "
            f"components {logs['components']}/{self.controller.schedule.num_components}  "
            f"{logs['seconds_per_step']:.2f} s/step  {left / 60:.1f} min left"
        )

    def start_clock(self) -> None:
        """Count time and tokens of steps from now on."""
        self._first_step = self.state.global_step
        self._last_log = (self.state.global_step, time.monotonic())

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
        # In here DeepSpeed has collectives of its own: a rank that fails between them can only end its process.
        super()._save_checkpoint(model, trial)
        with self.agreement.together(f"completing {folder}"):
            if self.args.should_save:
                checkpoint.save_method_state(folder, self.controller, self.fingerprint)
        with self.agreement.together(f"sealing {folder}"):
            if self.args.should_save:
                checkpoint.check_shards(folder, self.agreement.size, self.engine)
                checkpoint.seal(folder)
                checkpoint.rotate(Path(self.args.output_dir), self.keep_last)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter of a checkpoint, folded. There are no collectives in it, so that a full disk is found here."""
        with self.agreement.together(f"writing the adapter into {output_dir}"):
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter that a checkpoint holds for PEFT is folded; training goes on with the unfolded one."""
        checkpoint.load_adapter_parameters(Path(resume_from_checkpoint), self.controller.layers)


class _MethodCallback(TrainerCallback):
    """Where the Trainer's loop meets the method."""

    def __init__(self, trainer: DynamicLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        check_prepared(trainer.agreement, trainer, trainer.engine, trainer.adapter_dtype)
        if trainer.resumed_from is not None:
            checkpoint.load_method_state(trainer.resumed_from, trainer.controller)
            trainer.records.truncate_after(state.global_step)
            trainer.records.replace_events(trainer.controller.events)
            if trainer.owes_evaluation():
                trainer.evaluate()
        else:
            trainer.controller.verify("the adapter at the start")
        trainer.start_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        event = self.trainer.controller.after_optimizer_step(state.global_step)
        if event is not None:
            self.trainer.records.event(event)
        self.trainer.stop_if_preempted(control)
