"""Trains a method of PEFT like a run of this project: with the stock Trainer in one process, on the same rows in the
same order. The output is that of a run, with the adapter as plain LoRA.
"""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist.adapter.model import prepare_heads, trained_heads
from dora_dist.adapter.plain_lora import write_lora_adapter
from dora_dist.base_model.head import head_modules
from dora_dist.config.tasks import TASKS
from dora_dist.console.errors import PreemptedError
from dora_dist.console.text import say
from dora_dist.distributed import world
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.memory.estimate import card_bytes
from dora_dist.method.prune_event import PruneEvent
from dora_dist.runs import records, resume, summary
from dora_dist.runs.adapter_folder.writing import write_adapter
from dora_dist.setup import build, resolve, run_data
from dora_dist.setup.fingerprint import adapter_seed
from dora_dist.setup.recomputation import apply_recomputation
from dora_dist.setup.tasks import TASK_PARTS
from dora_dist.training.controller import NonFiniteAdapterError

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> plain LoRA factors ``(A (k, in), B (out, k))`` with the scale in B, on the CPU."""


class Peer(Protocol):
    """A method of PEFT.

    Attributes:
        title: the method's name in messages.
        own: the method's own settings, plain values; a run with other values is another run.
    """

    @property
    def title(self) -> str: ...

    @property
    def own(self) -> Mapping[str, Any]: ...

    def adapted(self, config: "RunConfig", resolved: resolve.ResolvedRun, base: PreTrainedModel) -> PeftModel:
        """The base with this method's adapter, with the run's layers, rank and scale.

        Args:
            config: the run's configuration.
            resolved: the resolved run.
            base: the loaded base; the random generators have the adapter's seed.
        """
        ...

    def after_gradients(self, model: PeftModel, step: int) -> None:
        """Called in every optimizer step while gradients exist; ``step`` is counted from 1."""

    def kept(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Mapping[str, Tensor]:
        """Layer -> boolean mask of the present components, on the CPU."""
        ...

    def factors(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Factors:
        """The adapter as plain LoRA.

        Raises:
            ExpectedRunError: the adapter is larger than its budget.
        """
        ...


def train_peer(config: "RunConfig", peer: Peer, notice: PreemptionNotice) -> None:
    """Train as configured, and write the files of a run of this project.

    There are no checkpoints to resume from: PEFT's AdaLoRA cannot be resumed after pruning, and a stock Trainer does
    not write ours. An interrupted run starts again from step 0.

    Args:
        config: the run's configuration.
        peer: method to train.
        notice: set when this process has received a signal to stop.

    Raises:
        ExpectedRunError: the adapter is not finite, or larger than its budget.
        PreemptedError: the process received a signal to stop.
    """
    tokenizer, data = run_data.read_data(config)
    device = world.connect("none", config.distributed.timeout_minutes).device
    assert device is not None
    resolved = resolve.resolve_run(config, tokenizer, data, card=card_bytes(device))
    run_records = _begin_records(config, resolved, peer.own)
    if run_records is None:
        say(f"{config.output_dir} holds a finished run with these settings")
        return
    base = build.load_base(config, device, tokenizer, data.labels)
    model = _adapted(config, resolved, peer, base)
    apply_recomputation(config, base, resolved.recomputation)
    trainer = _build_trainer(config, resolved, model)
    trainer.add_callback(_PeerCallback(peer, model, resolved, run_records, notice))
    began, steps = time.monotonic(), resolved.arguments.max_steps
    trainer.train()
    if trainer.state.global_step < steps:
        raise PreemptedError(f"preempted: {peer.title} starts again from step 0 when the same command is run again")
    tokens = int(resolved.plan.row_lengths(resolved.mixture.lengths).sum())
    run_records.metrics(steps, {"session_seconds": time.monotonic() - began, "session_tokens": tokens})
    _write_result(config, resolved, peer, model, run_records)
    print(summary.finish_run(Path(config.output_dir)), flush=True)


def is_mean_of_rows(config: "RunConfig") -> bool:
    """Whether a micro-batch's loss is a mean over its rows, which the Trainer divides by the accumulation steps.
    Otherwise it is a sum over tokens, divided by the tokens of the global batch."""
    return TASK_PARTS[config.task].row_losses(config) is not None


def base_of(model: PeftModel) -> PreTrainedModel:
    """The base inside a PEFT model, with the adapter in its layers."""
    # PEFT's type is only nn.Module.
    return cast(PreTrainedModel, model.get_base_model())


def check_finite(title: str, factors: Factors) -> None:
    """Refuse an adapter that is not finite.

    Raises:
        NonFiniteAdapterError: a factor is NaN or infinite.
    """
    for name, parts in factors.items():
        if not all(torch.isfinite(part).all() for part in parts):
            raise NonFiniteAdapterError(f"the adapter of {title} is not finite in {name}")


class TaskLoss(nn.Module):
    """A PEFT model for evaluation: its ``loss`` is the task's, without additional terms of the method.

    Args:
        model: the PEFT model.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.base = base_of(model)

    def forward(self, **batch: Any) -> Any:
        return self.base(**batch)

    def loss_only(self) -> AbstractContextManager[None]:
        """Does nothing: the logits are computed in any case."""
        return nullcontext()

    def generate(self, **arguments: Any) -> Tensor:
        # transformers' type covers all models, and some of them do not generate.
        output: Tensor = self.base.generate(**arguments)  # type: ignore[operator]
        return output

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config


def _begin_records(
    config: "RunConfig", resolved: resolve.ResolvedRun, own: Mapping[str, Any]
) -> records.RunRecords | None:
    """Start the records of a run; None if its folder holds the finished run."""
    run = Path(config.output_dir)
    fingerprint = dataclasses.replace(resolved.fingerprint, others=dict(own))
    earlier = resume.look(run, "auto")
    resume.check_settings(earlier, fingerprint)
    if earlier.finished:
        return None
    run_records = records.RunRecords(run, writes=True)
    run_records.describe_run(config, fingerprint, resolved.describe_data(), 1, resolved.unadapted)
    run_records.truncate_after(-1)
    return run_records


def _adapted(config: "RunConfig", resolved: resolve.ResolvedRun, peer: Peer, base: PreTrainedModel) -> PeftModel:
    """The base with the peer's adapter and trained heads, in float32, initialized by the run's seeds."""
    heads = head_modules(base)
    set_seed(adapter_seed(config))
    model = peer.adapted(config, resolved, base)
    prepare_heads(model, heads, torch.float32, cast_inputs=config.model.fuse)
    set_seed(config.seed)
    return model


def _build_trainer(config: "RunConfig", resolved: resolve.ResolvedRun, model: PeftModel) -> Trainer:
    """The stock Trainer on the run's rows in their order; it does not save, evaluate or print."""
    arguments, parts = resolved.arguments, TASK_PARTS[config.task]
    arguments.train_sampling_strategy = "sequential"
    arguments.save_strategy = "no"
    arguments.eval_strategy = "no"
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=parts.training_rows(resolved),
        data_collator=parts.collator(config, model, resolved.tokenizer),
        processing_class=resolved.tokenizer,
    )
    if is_mean_of_rows(config):
        trainer.model_accepts_loss_kwargs = False  # see dora_dist/base_model/losses.py
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _write_result(
    config: "RunConfig", resolved: resolve.ResolvedRun, peer: Peer, model: PeftModel, run_records: records.RunRecords
) -> None:
    """Check, measure and save the trained adapter."""
    factors = peer.factors(model, resolved)
    check_finite(peer.title, factors)
    event = PruneEvent(
        step=resolved.budget.schedule.final_step,
        kept=peer.kept(model, resolved),
        returned=0,
        final=True,
        num_parameters=sum(a.numel() + b.numel() for a, b in factors.values()),
    )
    run_records.event(event)
    base = base_of(model)
    evaluator = TASK_PARTS[config.task].evaluator(config, resolved, Agreement(base.device), model)
    measured = {f"eval_{name}": value for name, value in evaluator(TaskLoss(model)).items()}
    run_records.metrics(resolved.arguments.max_steps, measured)
    run_records.answers(resolved.arguments.max_steps, evaluator.shown)
    write = partial(
        write_lora_adapter,
        factors=factors,
        base_model=base.config.name_or_path or None,
        task_type=TASKS[config.task].peft_type,
        head={name: dict(head.named_parameters()) for name, head in trained_heads(model).items()},
    )
    run = Path(config.output_dir)
    write_adapter(run / "adapter", run, resolved.tokenizer, write, peer.title)


class _PeerCallback(TrainerCallback):
    """Calls the peer while gradients exist, and writes the run's records."""

    def __init__(
        self,
        peer: Peer,
        model: PeftModel,
        resolved: resolve.ResolvedRun,
        run_records: records.RunRecords,
        notice: PreemptionNotice,
    ) -> None:
        self._peer = peer
        self._model = model
        self._resolved = resolved
        self._records = run_records
        self._notice = notice
        self._last = (0, time.monotonic())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = (0, time.monotonic())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._peer.after_gradients(self._model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._notice.received is not None and state.global_step < state.max_steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        values: dict[str, float] = dict(event["logs"])
        values.pop("train_loss", None)
        if "loss" in values:  # the stock Trainer's loss, including the method's additional terms
            now, step = time.monotonic(), state.global_step
            kept = self._peer.kept(self._model, self._resolved)
            values["seconds_per_step"] = (now - self._last[1]) / max(step - self._last[0], 1)
            values["components"] = sum(int(mask.sum()) for mask in kept.values())
            self._last = (step, now)
        self._records.metrics(state.global_step, values)
