"""PEFT's AdaLoRA, trained by the stock Trainer on the data, steps and schedule of a run: causal language models and
sequence classification.

One process without an engine: under ZeRO no callback of the Trainer can drive it (docs/method.md). What is AdaLoRA's
own: sensitivity times uncertainty as importance, the cubic that begins fast, the orthogonal regularizer. Two things
are put right, so that the comparison is one of methods: the regularizer, which PEFT adds to every micro-batch, counts
once per optimizer step, and evaluation is of the task's loss alone.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import set_seed
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_dist.adapter.model import prepare_heads, trained_heads
from dora_dist.adapter.plain_lora import write_lora_adapter
from dora_dist.base_model.head import head_modules
from dora_dist.config.tasks import TASKS
from dora_dist.console import files
from dora_dist.console.errors import ExpectedRunError, PreemptedError
from dora_dist.console.text import say
from dora_dist.distributed import world
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.memory.estimate import card_bytes
from dora_dist.method.prune_event import PruneEvent
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.runs import records, resume, summary
from dora_dist.setup import build, resolve, run_data
from dora_dist.setup.fingerprint import adapter_seed
from dora_dist.setup.recomputation import apply_recomputation
from dora_dist.setup.tasks import TASK_PARTS
from dora_dist.training.controller import NonFiniteAdapterError

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig

RANK_EPSILON = 1e-5
"""What PEFT adds to the rank that it divides by."""


def train_adalora(config: "RunConfig", own: Mapping[str, Any], notice: PreemptionNotice) -> None:
    """Train as configured and write what a run of this project writes, the adapter as plain LoRA.

    There are no checkpoints to go on from: PEFT's cannot be resumed after pruning. A run that was stopped begins anew.

    Args:
        config: of the run; of ``pruning``, the phases and the interval.
        own: ``orth_reg_weight``, ``beta1``, ``beta2``, ``interval`` (None for that of ``pruning``).
        notice: of this process's preemption.

    Raises:
        ExpectedRunError: the adapter is not finite, or AdaLoRA kept more than its budget.
        PreemptedError: the process was told to stop.
    """
    tokenizer, data = run_data.read_data(config)
    device = world.connect("none", config.distributed.timeout_minutes).device
    assert device is not None
    resolved = resolve.resolve_run(config, tokenizer, data, card=card_bytes(device))
    run_records = _begin_records(config, resolved, own)
    if run_records is None:
        say(f"{config.output_dir} holds a finished run with these settings")
        return
    base = build.load_base(config, device, tokenizer, data.labels)
    model = _add_adalora(config, resolved, own, base)
    apply_recomputation(config, base, resolved.recomputation)
    trainer = _build_trainer(config, resolved, model)
    trainer.add_callback(_AdaLoraCallback(model, run_records, notice))
    began, steps = time.monotonic(), resolved.arguments.max_steps
    trainer.train()
    if trainer.state.global_step < steps:
        raise PreemptedError("preempted: PEFT's AdaLoRA begins anew when the same command is started again")
    tokens = int(resolved.plan.row_lengths(resolved.mixture.lengths).sum())
    run_records.metrics(steps, {"session_seconds": time.monotonic() - began, "session_tokens": tokens})
    _write_result(config, resolved, model, run_records)
    print(summary.finish_run(Path(config.output_dir)), flush=True)


def _begin_records(
    config: "RunConfig", resolved: resolve.ResolvedRun, own: Mapping[str, Any]
) -> records.RunRecords | None:
    """Records of a run that begins; None where its folder holds it finished."""
    run = Path(config.output_dir)
    others = {f"adalora.{name}": value for name, value in own.items()}
    fingerprint = dataclasses.replace(resolved.fingerprint, others=others)
    earlier = resume.look(run, "auto")
    resume.check_settings(earlier, fingerprint)
    if earlier.finished:
        return None
    run_records = records.RunRecords(run, writes=True)
    run_records.describe_run(config, fingerprint, resolved.describe_data(), 1, resolved.left_out)
    run_records.truncate_after(-1)
    return run_records


def _schedule(resolved: resolve.ResolvedRun) -> BudgetSchedule:
    schedule = resolved.budget.schedule
    assert isinstance(schedule, BudgetSchedule), "AdaLoRA prunes"
    return schedule


def _is_mean_of_rows(config: "RunConfig") -> bool:
    """Whether a micro-batch's loss is a mean over its rows, which the Trainer divides by the accumulation steps with
    the regularizer in it; else it is a sum over tokens divided by those of the global batch."""
    return TASK_PARTS[config.task].row_losses(config) is not None


def _add_adalora(
    config: "RunConfig", resolved: resolve.ResolvedRun, own: Mapping[str, Any], base: PreTrainedModel
) -> PeftModel:
    """The base with AdaLoRA and the heads that it trains, in float32, started by the run's seed."""
    heads = head_modules(base)
    regularizers = 1 if _is_mean_of_rows(config) else resolved.arguments.gradient_accumulation_steps
    set_seed(adapter_seed(config))
    adalora = peft_config(config, own, _schedule(resolved), list(resolved.ranks), heads, regularizers)
    model = get_peft_model(base, adalora)
    prepare_heads(model, heads, torch.float32, cast_inputs=config.model.fuse)
    set_seed(config.seed)
    return model


def _build_trainer(config: "RunConfig", resolved: resolve.ResolvedRun, model: PeftModel) -> Trainer:
    """The stock Trainer on the rows of a run in their order; it neither saves nor evaluates nor prints."""
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
    if _is_mean_of_rows(config):
        trainer.model_accepts_loss_kwargs = False  # see dora_dist/base_model/losses.py
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _write_result(
    config: "RunConfig",
    resolved: resolve.ResolvedRun,
    model: PeftModel,
    run_records: records.RunRecords,
) -> None:
    """Check, measure and save what was trained."""
    schedule, base = _schedule(resolved), _base_of(model)
    kept = kept_triplets(model)
    factors = folded_triplets(model, kept)
    check_result(factors, schedule)
    event = PruneEvent(
        step=schedule.final_step,
        kept=kept,
        returned=0,
        final=True,
        num_parameters=sum(a.numel() + b.numel() for a, b in factors.values()),
    )
    run_records.event(event)
    evaluator = TASK_PARTS[config.task].evaluator(config, resolved, Agreement(base.device), model)
    measured = {f"eval_{name}": value for name, value in evaluator(TaskLoss(model)).items()}
    run_records.metrics(resolved.arguments.max_steps, measured)
    run_records.answers(resolved.arguments.max_steps, evaluator.shown)
    adapter = Path(config.output_dir) / "adapter"
    write_lora_adapter(
        adapter,
        factors,
        base.config.name_or_path or None,
        task_type=TASKS[config.task].peft_type,
        head={name: dict(head.named_parameters()) for name, head in trained_heads(model).items()},
    )
    resolved.tokenizer.save_pretrained(adapter)
    files.follow_umask(adapter)


def peft_config(
    config: "RunConfig",
    own: Mapping[str, Any],
    schedule: BudgetSchedule,
    layers: list[str],
    heads: list[str],
    regularizers: int,
) -> AdaLoraConfig:
    """AdaLoRA with the ranks, layers, scale and phases of a run: it begins to prune after the same warm-up, and ends
    after the same step.

    Args:
        config: of the run.
        own: as of :func:`train_adalora`.
        schedule: of the run.
        layers: names of the modules to adapt.
        heads: names of the modules to train as a whole.
        regularizers: how many times the regularizer enters an optimizer step in full.
    """
    return AdaLoraConfig(
        init_r=schedule.initial_rank,
        target_r=schedule.target_rank,
        tinit=int(schedule.total_steps * schedule.warmup_fraction),
        tfinal=schedule.total_steps - schedule.final_step,
        deltaT=own["interval"] or schedule.interval,
        total_step=schedule.total_steps,
        beta1=own["beta1"],
        beta2=own["beta2"],
        # PEFT adds it to the loss of every micro-batch. PEFT before 0.20 refuses 0: in float32, this is 0.
        orth_reg_weight=own["orth_reg_weight"] / regularizers or sys.float_info.min,
        # Divided by init_r for the whole run. PEFT multiplies by it; its type is an int.
        lora_alpha=config.adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=config.adapter.dropout,
        target_modules=layers,
        modules_to_save=list(heads) or None,  # PEFT adds names to it
        task_type=TASKS[config.task].peft_type,
    )


class _AdaLoraCallback(TrainerCallback):
    """Lets AdaLoRA allocate where gradients are still there, and keeps the records of a run."""

    def __init__(self, model: PeftModel, run_records: records.RunRecords, notice: PreemptionNotice) -> None:
        self._model = model
        self._records = run_records
        self._notice = notice
        self._last = (0, time.monotonic())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = (0, time.monotonic())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        cast(AdaLoraModel, self._model.base_model).update_and_allocate(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._notice.received is not None and state.global_step < state.max_steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        values: dict[str, float] = dict(event["logs"])
        values.pop("train_loss", None)
        if "loss" in values:  # with the regularizer, as the stock Trainer has it
            now, step = time.monotonic(), state.global_step
            values["seconds_per_step"] = (now - self._last[1]) / max(step - self._last[0], 1)
            values["components"] = sum(int(mask.sum()) for mask in kept_triplets(self._model).values())
            self._last = (step, now)
        self._records.metrics(state.global_step, values)


class TaskLoss(nn.Module):
    """A model with AdaLoRA as an evaluation wants it: its ``loss`` is the task's, without the regularizer.

    Args:
        model: of PEFT.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.base = _base_of(model)

    def forward(self, **batch: Any) -> Any:
        return self.base(**batch)

    def loss_only(self) -> AbstractContextManager[None]:
        """The logits are computed in any case."""
        return nullcontext()

    def generate(self, **arguments: Any) -> Tensor:
        # transformers' type is that of every model, of which some do not generate.
        output: Tensor = self.base.generate(**arguments)  # type: ignore[operator]
        return output

    @property
    def device(self) -> torch.device:
        return self.base.device


def _base_of(model: PeftModel) -> PreTrainedModel:
    # PEFT's type is that of every base: a module.
    return cast(PreTrainedModel, model.get_base_model())


def _layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    found = {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)
    }
    return dict(sorted(found.items()))


def kept_triplets(model: PeftModel) -> dict[str, Tensor]:
    """Layer -> boolean mask, shape ``(r,)``, of the triplets that AdaLoRA has not pruned, by its own record; all before
    its first event."""
    pattern = cast(AdaLoraConfig, model.peft_config["default"]).rank_pattern
    if pattern is None:
        return {name: torch.ones(len(layer.lora_E["default"])).bool() for name, layer in _layers(model).items()}
    masks = {name.split(".lora_E")[0]: mask for name, mask in pattern.items()}
    return {name: torch.tensor(masks[name], dtype=torch.bool) for name in _layers(model)}


@torch.no_grad()
def folded_triplets(model: PeftModel, kept: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain LoRA factors ``(A (k, in), B (out, k))`` by layer: singular values and scale go into B."""
    factors = {}
    for name, layer in _layers(model).items():
        scale = layer.scaling["default"] / (layer.ranknum["default"] + RANK_EPSILON)
        a, e, b = (getattr(layer, f"lora_{part}")["default"].float() for part in "AEB")
        chosen = kept[name]
        factors[name] = (a[chosen].cpu().contiguous(), (b[:, chosen] * (e[chosen, 0] * scale)).cpu().contiguous())
    return factors


def check_result(factors: Mapping[str, tuple[Tensor, Tensor]], schedule: BudgetSchedule) -> None:
    """Refuse an adapter that is none, or larger than its budget.

    Raises:
        NonFiniteAdapterError: a factor is NaN or infinite.
        ExpectedRunError: more triplets are left than the budget has.
    """
    for name, parts in factors.items():
        if not all(torch.isfinite(part).all() for part in parts):
            raise NonFiniteAdapterError(f"AdaLoRA's adapter of {name} is not finite")
    left = sum(a.shape[0] for a, _ in factors.values())
    if left > schedule.final_num_kept:
        raise ExpectedRunError(f"AdaLoRA has kept {left} triplets instead of the budget {schedule.final_num_kept}")
