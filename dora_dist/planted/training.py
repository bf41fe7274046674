"""One student: the real layers, the real controller, and the trainer's settings, learning the teacher's distribution."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from dora_dist.adapter_config import DynamicLoraConfig
from dora_dist.agreement import Agreement
from dora_dist.benchmark.base import share
from dora_dist.controller import DynamicRankController
from dora_dist.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.planted.options import Method, Options
from dora_dist.schedule import BudgetSchedule

WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
LR_WARMUP = 0.06
EQUILIBRIUM_WEIGHT = 0.1
HELD_OUT_AT_ONCE = 64


@dataclass(frozen=True)
class Truth:
    """What a student is to learn, and what it is held against.

    Args:
        base: frozen.
        teacher: frozen.
        planted: ranks by layer.
        initial_rank: components of each layer of a student with dynamic ranks.
        train: rows of training in their order, shape ``(steps x batch, length)``.
        held_out: rows by split.
        seed: of the student's start.
    """

    base: PreTrainedModel
    teacher: PreTrainedModel
    planted: Mapping[str, int]
    initial_rank: int
    train: Tensor
    held_out: Mapping[str, Tensor]
    seed: int


def train_student(truth: Truth, method: Method, learning_rate: float, options: Options) -> dict[str, Any]:
    """Train from the base and measure at the end of the run.

    Returns:
        Held-out divergences by split (nats a token), kept ranks by layer, components returned, what the layers looked
        like at the final event, and seconds.
    """
    began = time.perf_counter()
    student, controller = _build(truth, method, options)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(LR_WARMUP * options.steps), options.steps)
    seen: dict[str, Any] = {}
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
                norms = _update_norms(student)
            event = controller.after_optimizer_step(step)
            if event is not None and event.final:
                seen = {
                    "update_norm": norms,
                    "score": {name: scores.mean().item() for name, scores in controller.smoothed_scores.items()},
                }
        optimizer.zero_grad()
    if controller is not None:
        controller.finish()
    student.eval()
    return {
        "divergence": {split: _held_out(truth.teacher, student, rows) for split, rows in truth.held_out.items()},
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


def _build(
    truth: Truth, method: Method, options: Options
) -> tuple[DynamicLoraModel, DynamicRankController | None]:
    """A student; without a controller where the ranks are fixed: the mask is then set at the start, so that such a
    layer is plain LoRA of its rank (gates are 1 and stay so)."""
    adapter = DynamicLoraConfig(
        target_rank=options.target_rank,
        initial_rank=truth.initial_rank,
        alpha=options.scale * truth.initial_rank,  # the scale of all methods, whatever their rank
        dropout=0.0,
        train_gates=method.dynamic,
        seed=truth.seed,
    )
    student = add_dynamic_lora(share(truth.base), adapter)
    layers = student.adapted_layers()
    if not method.dynamic:
        for name, layer in layers.items():
            rank = truth.planted[name] if method.name == "oracle" else options.target_rank
            layer.component_mask.copy_(torch.arange(truth.initial_rank) < rank)
        return student, None
    schedule = BudgetSchedule(
        total_steps=options.steps,
        num_layers=len(layers),
        initial_rank=truth.initial_rank,
        target_rank=options.target_rank,
        interval=options.interval,
    )
    return student, DynamicRankController(layers, schedule, Agreement(), score=method.score)


@torch.no_grad()
def _held_out(teacher: PreTrainedModel, student: torch.nn.Module, rows: Tensor) -> float:
    parts = rows.split(HELD_OUT_AT_ONCE)
    return sum(divergence(teacher, student, part).item() * part.numel() for part in parts) / rows.numel()


@torch.no_grad()
def _update_norms(student: DynamicLoraModel) -> dict[str, float]:
    """Frobenius norm of each layer's update relative to its weight."""
    return {
        name: (layer.scale * (layer.lora_b * layer.effective_gate()) @ layer.lora_a).norm().item()
        / layer.base_layer.weight.norm().item()
        for name, layer in student.adapted_layers().items()
    }
