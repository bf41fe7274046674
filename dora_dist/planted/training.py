"""Trains one student to match the teacher's predictions, with real layers, the real controller and real settings."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.base_model.copies import share
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.pruning import FILL_SLOTS, GATE_SENSITIVITY, GROW, MOVE, PruningConfig
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import Moments
from dora_dist.method.budget import Budget
from dora_dist.method.schedule import BudgetSchedule, GrowthSchedule
from dora_dist.planted.options import FIXED, ORACLE, Options
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import Criterion, LayerSensitivity, criterion_of
from dora_dist.training.rules.grow import Grow
from dora_dist.training.rules.move import Move
from dora_dist.training.rules.prune import Prune
from dora_dist.training.rules.rule import Rule

WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
LR_WARMUP = 0.06
EQUILIBRIUM_WEIGHT = 0.1
SMOOTHING = 0.9
HELD_OUT_AT_ONCE = 64


@dataclass(frozen=True)
class Truth:
    """What a student must learn, and the data that measure it.

    Args:
        base: the frozen base.
        teacher: the frozen teacher.
        planted: planted ranks by layer.
        initial_rank: initial components of each layer in a student with dynamic ranks.
        train: training rows in order, shape ``(steps x batch, length)``.
        held_out: split -> held-out rows.
        seed: seed of the student's start.
    """

    base: PreTrainedModel
    teacher: PreTrainedModel
    planted: Mapping[str, int]
    initial_rank: int
    train: Tensor
    held_out: Mapping[str, Tensor]
    seed: int


class Remembering(Criterion):
    """A criterion that keeps the scores of the latest event, because some criteria reset theirs after each event.

    Attributes:
        used: shape ``(components of the model,)``, float64.
    """

    def __init__(self, inner: Criterion) -> None:
        self._inner = inner
        self.scores, self.at_events_only = inner.scores, inner.at_events_only
        self.used = inner.scores.clone()

    def update(self, agreement: Agreement) -> None:
        self._inner.update(agreement)
        self.scores = self._inner.scores

    def after_event(self) -> None:
        self.used = self._inner.scores.clone()
        self._inner.after_event()

    def end(self) -> None:
        self._inner.end()


def train_student(truth: Truth, method: str, learning_rate: float, options: Options) -> dict[str, Any]:
    """Train a student from the base, and measure it at the end of the run.

    Returns:
        Held-out divergences by split (nats per token), kept ranks by layer, the scores of the final event, and seconds.
    """
    began = time.perf_counter()
    student, controller = _build(truth, method, options)
    norms: dict[str, float] = {}
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    if controller is not None:
        controller.attach(Moments(student, optimizer))
    schedule = get_linear_schedule_with_warmup(optimizer, round(LR_WARMUP * options.steps), options.steps)
    student.train()
    for step, rows in enumerate(truth.train.split(options.batch), 1):
        loss = divergence(truth.teacher, student, rows)
        penalty = controller.penalty() if controller is not None else None
        if penalty is not None:
            loss = loss + EQUILIBRIUM_WEIGHT * penalty
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        if controller is not None:
            if step == controller.schedule.final_step:
                norms = update_norms(student)
            controller.after_optimizer_step(step)
        optimizer.zero_grad()
    seen = {}
    if controller is not None:
        controller.finish()
        seen = {"score": _mean_scores(controller), "update_norm": norms}
    student.eval()
    return {
        "divergence": {
            split: held_out_divergence(truth.teacher, student, rows) for split, rows in truth.held_out.items()
        },
        "kept": {name: int(layer.component_mask.sum()) for name, layer in student.adapted_layers().items()},
        "at_final_event": seen,
        "seconds": time.perf_counter() - began,
    }


def divergence(teacher: PreTrainedModel, student: torch.nn.Module, rows: Tensor) -> Tensor:
    """``KL(teacher || student)``, mean over all tokens of rows of shape ``(batch, length)``, in nats. Scalar."""
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(input_ids=rows).logits, -1)
    found = functional.log_softmax(student(input_ids=rows).logits, -1)
    return functional.kl_div(found, wanted, log_target=True, reduction="sum") / rows.numel()


def _build(truth: Truth, method: str, options: Options) -> tuple[DynamicLoraModel, DynamicRankController | None]:
    """A student, and its controller. With fixed ranks there is no controller: the mask is set at the start, and the
    layer is plain LoRA of its rank (gates are 1 and stay 1)."""
    dynamic = method not in FIXED
    starts: dict[str, int] = {MOVE: options.target_rank, GROW: 1}
    start = starts.get(method, truth.initial_rank)
    adapter = DynamicLoraConfig(
        target_rank=options.target_rank,
        initial_rank=start,
        slots=truth.initial_rank if method in FILL_SLOTS else None,
        alpha=options.scale * max(start, options.target_rank),  # the same scale for all methods, whatever their rank
        dropout=0.0,
        init=options.init if dynamic else "lora",
        train_gates=dynamic,
        seed=truth.seed,
    )
    student = add_dynamic_lora(share(truth.base), adapter)
    layers = student.adapted_layers()
    if not dynamic:
        for name, layer in layers.items():
            rank = truth.planted[name] if method == ORACLE else options.target_rank
            layer.component_mask.copy_(torch.arange(truth.initial_rank) < rank)
        return student, None
    kind = GrowthSchedule if method == GROW else BudgetSchedule
    schedule = kind(
        total_steps=options.steps,
        num_layers=len(layers),
        initial_rank=start,
        target_rank=options.target_rank,
        interval=options.interval,
    )
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    rule: Rule = Prune(layers, budget)
    if method == MOVE:
        rule = Move(layers, budget, num_moved=PruningConfig.moved_per_event, seed=truth.seed)
    elif method == GROW:
        rule = Grow(layers, budget, warmup=options.interval)
    criterion = Remembering(_criterion(method, layers, truth.seed))
    return student, DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=rule)


def _criterion(method: str, layers: Mapping[str, DynamicLoraLinear], seed: int) -> Criterion:
    """The criterion of a method with dynamic ranks."""
    if method == GROW:
        return LayerSensitivity([layer.gate for layer in layers.values()])
    return criterion_of(GATE_SENSITIVITY if method == MOVE else method, list(layers.values()), SMOOTHING, seed)


@torch.no_grad()
def held_out_divergence(teacher: PreTrainedModel, student: torch.nn.Module, rows: Tensor) -> float:
    """:func:`divergence` over any number of rows."""
    parts = rows.split(HELD_OUT_AT_ONCE)
    total: float = sum(divergence(teacher, student, part).item() * part.numel() for part in parts)
    return total / rows.numel()


def _mean_scores(controller: DynamicRankController) -> dict[str, float]:
    """Layer -> mean over its components of the scores that the final event used."""
    assert isinstance(controller.criterion, Remembering)
    sizes = [layer.gate.numel() for layer in controller.layers.values()]
    return dict(
        zip(controller.layers, (part.mean().item() for part in controller.criterion.used.split(sizes)), strict=True)
    )


@torch.no_grad()
def update_norms(student: DynamicLoraModel) -> dict[str, float]:
    """Layer -> Frobenius norm of its update relative to its weight."""
    return {
        name: (layer.scale * (layer.lora_b * layer.effective_gate()) @ layer.lora_a).norm().item()
        / layer.base_layer.weight.norm().item()
        for name, layer in student.adapted_layers().items()
    }
