"""The contestants: the same step of the same base with different adapters.

A step consists of forward with labels, backward, clipping, AdamW (fused, the Trainer's default) and ``zero_grad``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from dora_dist.adapter.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.base_model.copies import share
from dora_dist.base_model.kernels import NO_KERNELS, use_kernels
from dora_dist.base_model.recomputation import recomputable_layers, recompute_first
from dora_dist.benchmark.options import ADALORA, DYNAMIC, FLOOR, LIGER, LORA, PRUNED, Options
from dora_dist.benchmark.shapes import Shape
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.console.text import say
from dora_dist.data.batches import predicting
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import Budget
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController

ALPHA = 8.0
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
EQUILIBRIUM_WEIGHT = 0.1
STEPS_TO_PRUNE = 6
"""Optimizer steps before the final event of the pruned contestant."""
ENDLESS = 10**6
"""Optimizer steps of a run so long that its first event is never reached here."""
ADALORA_STEPS = 10_000
"""Steps of AdaLoRA's schedule, which prunes in every step from the first (``deltaT`` is 1 by default)."""
SAME_LOSS = 1e-5
"""Largest relative difference between losses that must be equal."""
NEAR_LOSS = 1e-2
"""Largest relative difference between losses that different kernels compute in bfloat16."""
SAME_LOSS_OF_KERNELS = 1e-3
"""Largest relative difference if kernels, which round bfloat16 in other places, compute some of the losses."""


class Contestant:
    """A model that takes steps.

    Args:
        model: the model, with or without an adapter.
        agreement: exchanges over the ranks.
        autocast: dtype to compute in if the adapter has another one, or None.
        average: whether gradients are averaged over the ranks, as in data-parallel training: in one all-reduce of a
            flat tensor.
    """

    def __init__(
        self, model: nn.Module, agreement: Agreement, autocast: torch.dtype | None = None, average: bool = False
    ) -> None:
        self.model = model.train()
        self.agreement = agreement
        self.steps = 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._autocast = autocast
        self._average = average
        self.optimizer = (
            torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
            if self.parameters
            else None
        )

    def loss(self, rows: Tensor) -> Tensor:
        """Loss of rows of shape ``(batch, sequence)``, with every token as a label."""
        with torch.autocast(rows.device.type, self._autocast, enabled=self._autocast is not None):
            loss: Tensor = self.model(input_ids=rows, labels=rows, **self._beside(rows)).loss
        return loss

    def _beside(self, rows: Tensor) -> dict[str, Tensor]:
        """The other inputs that a run's batch contains beside rows and labels."""
        return {}

    def prepare(self, rows: Callable[[int], Tensor]) -> None:
        """Work before the first measured step; ``rows`` maps a step's number to its rows."""

    def step(self, rows: Tensor) -> None:
        """One optimizer step."""
        self.steps += 1
        self._backward(self.loss(rows))
        self._update()
        self._after_update()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self) -> None:
        if self.optimizer is None:
            return
        if self._average:
            self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.agreement.add_up(flat)
        flat /= self.agreement.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _after_update(self) -> None:
        pass


class LigerContestant(Contestant):
    """Uses Liger's kernels: in its own modules for norms, MLPs and the loss; during a step, for rotary positions."""

    def step(self, rows: Tensor) -> None:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb):
            super().step(rows)


class AdaLoraContestant(Contestant):
    """Follows the loop in PEFT's documentation: AdaLoRA's update is between the optimizer's step and ``zero_grad``."""

    def _after_update(self) -> None:
        cast(peft.AdaLoraModel, self.model.base_model).update_and_allocate(self.steps)


class DynamicContestant(Contestant):
    """Runs the method like :class:`~dora_dist.training.trainer.DynamicLoraTrainer`.

    Args:
        model: the model with an adapter, as :func:`~dora_dist.adapter.model.add_dynamic_lora` makes it.
        agreement: exchanges over the ranks.
        schedule: the schedule of the budget.
        autocast: dtype to compute in, or None; see :class:`Contestant`.
        average: whether gradients are averaged; see :class:`Contestant`.
    """

    def __init__(
        self,
        model: DynamicLoraModel,
        agreement: Agreement,
        schedule: BudgetSchedule,
        autocast: torch.dtype | None = None,
        average: bool = False,
    ) -> None:
        super().__init__(model, agreement, autocast, average)
        self._predicting: Tensor | None = None
        layers = model.adapted_layers()
        self.controller = DynamicRankController(layers, Budget(schedule, dict.fromkeys(layers, 1)), agreement)

    def _beside(self, rows: Tensor) -> dict[str, Tensor]:
        if self._predicting is None:
            self._predicting = predicting(torch.zeros(rows.shape, dtype=torch.int64)).to(rows.device)
        return {"predicting": self._predicting}

    def _backward(self, loss: Tensor) -> None:
        penalty = self.controller.penalty()
        if penalty is not None:
            loss = loss + EQUILIBRIUM_WEIGHT * penalty.to(loss.dtype)
        loss.backward()

    def _after_update(self) -> None:
        self.controller.after_optimizer_step(self.steps)
        self.agreement.any(False)  # stands for the exchange on whether a rank must stop

    def step_in_parts(self, rows: Tensor, now: Callable[[], float]) -> dict[str, float]:
        """Take one optimizer step; returns the seconds of the method's parts and of the whole ``step``. The penalty has
        its own backward here, so that it can be timed alone; the gradients are the same."""
        self.steps += 1
        began = now()
        loss = self.loss(rows)
        forward = now()
        penalty = self.controller.penalty()
        assert penalty is not None, "the parts are those of steps before the final event"
        task = now()
        loss.backward()
        backward = now()
        (EQUILIBRIUM_WEIGHT * penalty).backward()
        update = now()
        self._update()
        scoring = now()
        self.controller.after_optimizer_step(self.steps)
        agreement = now()
        self.agreement.any(False)
        end = now()
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        return {
            "penalty, forward": task - forward,
            "penalty, backward": update - backward,
            "scoring and smoothing": agreement - scoring,
            "agreement": end - agreement,
            "step": now() - began,
        }


class PrunedContestant(DynamicContestant):
    """The method after a few steps and the final event: without penalty and scores, and with fewer components."""

    def prepare(self, rows: Callable[[int], Tensor]) -> None:
        for number in range(STEPS_TO_PRUNE):
            self.step(rows(number))
        self.controller.finish()

    def kept_ranks(self) -> list[int]:
        """Components that each layer has kept."""
        return [int(layer.component_mask.sum()) for layer in self.controller.layers.values()]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions that all contestants of a comparison share.

    Args:
        base: the frozen base; all share its tensors, and none changes them.
        options: the options with ranks, dtypes and seed.
        agreement: exchanges over the ranks.
        checkpointing: whether gradient checkpointing is on.
        dropout: dropout of the adapters.
        average: whether gradients are averaged; see :class:`Contestant`.
    """

    base: LlamaForCausalLM
    options: Options
    agreement: Agreement
    checkpointing: bool = False
    dropout: float = 0.0
    average: bool = False

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of the adapters' parameters."""
        dtype: torch.dtype = getattr(torch, self.options.adapter_dtype)
        return dtype

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype to compute in, or None; see :class:`Contestant`."""
        return None if self.adapter_dtype == self.base.dtype else self.base.dtype


def all_conditions(
    shape: Shape, base: LlamaForCausalLM, options: Options, agreement: Agreement
) -> Iterator[Conditions]:
    """Conditions for each checkpointing setting of a shape with each dropout; each is printed."""
    for checkpointing in shape.checkpointing:
        for dropout in options.dropouts:
            say(f"{shape.name}, checkpointing {'on' if checkpointing else 'off'}, dropout {dropout:g}")
            yield Conditions(
                base=base, options=options, agreement=agreement, checkpointing=checkpointing, dropout=dropout
            )


def build(name: str, conditions: Conditions) -> Contestant:
    """The contestant of this name (one of ``CONTESTANTS``), not prepared yet."""
    model = share(conditions.base)
    torch.manual_seed(conditions.options.seed)
    contestant = BUILDERS[name](model, conditions)
    if conditions.checkpointing:
        recompute_first(model, len(recomputable_layers(model)))
    return contestant


def _floor(model: LlamaForCausalLM, conditions: Conditions) -> Contestant:
    _let_gradients_begin(model)
    return Contestant(model, conditions.agreement, conditions.autocast, conditions.average)


def _lora(model: LlamaForCausalLM, conditions: Conditions) -> Contestant:
    config = peft.LoraConfig(r=conditions.options.rank, **_peft_settings(conditions))
    return Contestant(
        _with_peft(model, config, conditions), conditions.agreement, conditions.autocast, conditions.average
    )


def _liger(model: LlamaForCausalLM, conditions: Conditions) -> LigerContestant:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    config = peft.LoraConfig(r=conditions.options.rank, **_peft_settings(conditions))
    wrapped = _with_peft(model, config, conditions)
    with ExitStack() as kept:
        # Liger also replaces names in transformers' module, which all contestants share.
        for name in ("LlamaRMSNorm", "LlamaMLP"):
            kept.enter_context(mock.patch.object(modeling_llama, name, getattr(modeling_llama, name)))
        apply_liger_kernel_to_llama(rope=False, model=model)
    return LigerContestant(wrapped, conditions.agreement, conditions.autocast, conditions.average)


def _adalora(model: LlamaForCausalLM, conditions: Conditions) -> AdaLoraContestant:
    config = peft.AdaLoraConfig(
        init_r=conditions.options.rank,
        target_r=conditions.options.target_rank,
        tinit=0,
        tfinal=0,
        total_step=ADALORA_STEPS,
        **_peft_settings(conditions),
    )
    return AdaLoraContestant(
        _with_peft(model, config, conditions), conditions.agreement, conditions.autocast, conditions.average
    )


def _dynamic(model: LlamaForCausalLM, conditions: Conditions) -> DynamicContestant:
    adapted = _with_dynamic_lora(model, conditions)
    schedule = BudgetSchedule(total_steps=ENDLESS, **_sizes(adapted, conditions))
    return DynamicContestant(adapted, conditions.agreement, schedule, conditions.autocast, conditions.average)


def _pruned(model: LlamaForCausalLM, conditions: Conditions) -> PrunedContestant:
    adapted = _with_dynamic_lora(model, conditions)
    schedule = BudgetSchedule(
        total_steps=2 * STEPS_TO_PRUNE,
        warmup_fraction=0,
        final_fraction=0.5,
        interval=STEPS_TO_PRUNE,
        **_sizes(adapted, conditions),
    )
    return PrunedContestant(adapted, conditions.agreement, schedule, conditions.autocast, conditions.average)


BUILDERS: Mapping[str, Callable[[LlamaForCausalLM, Conditions], Contestant]] = {
    FLOOR: _floor,
    LORA: _lora,
    LIGER: _liger,
    ADALORA: _adalora,
    DYNAMIC: _dynamic,
    PRUNED: _pruned,
}


def _peft_settings(conditions: Conditions) -> dict[str, Any]:
    return {
        "lora_alpha": ALPHA,
        "lora_dropout": conditions.dropout,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def _with_peft(model: LlamaForCausalLM, config: peft.LoraConfig, conditions: Conditions) -> nn.Module:
    wrapped: nn.Module = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(conditions.adapter_dtype)
    return wrapped


def _with_dynamic_lora(model: LlamaForCausalLM, conditions: Conditions) -> DynamicLoraModel:
    kernels = NO_KERNELS
    if conditions.options.kernels:
        kernels = use_kernels(model, conditions.options.kernels)
    if kernels.names != conditions.options.kernels:
        raise RuntimeError(f"--kernels is {' '.join(conditions.options.kernels)}, of which not all run here: see above")
    adapted = add_dynamic_lora(
        model,
        DynamicLoraConfig(
            initial_rank=conditions.options.rank,
            target_rank=conditions.options.target_rank,
            alpha=ALPHA,
            dropout=conditions.dropout,
            dtype=conditions.options.adapter_dtype,
            seed=conditions.options.seed,
        ),
        kernels=kernels,
    )
    reason = adapted.use_loss_without_logits()  # as in every run
    if reason is not None:
        raise RuntimeError(f"the loss of the benchmark's model is not computed as in a run: {reason}")
    return adapted


def _sizes(adapted: DynamicLoraModel, conditions: Conditions) -> dict[str, int]:
    return {
        "num_layers": len(adapted.adapted_layers()),
        "initial_rank": conditions.options.rank,
        "target_rank": conditions.options.target_rank,
    }


def _let_gradients_begin(model: LlamaForCausalLM) -> None:
    """Start gradients where they end for an adapter on every linear layer: at the outputs of the first projections.
    With a start at the embedding, the floor would do work that no contestant does (the input gradients of q, k and v in
    the first layer: a tenth of the step for two layers), and every contestant would look closer to the floor."""
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def check_same_start(contestants: dict[str, Contestant], rows: Tensor) -> None:
    """Check that all adapters start as the base model: a contestant with a different first loss does other work.
    Liger's kernels round differently, so its loss has a larger tolerance.

    Raises:
        RuntimeError: a loss differs.
    """
    losses = {name: contestant.loss(rows).item() for name, contestant in contestants.items() if name != ADALORA}
    exact = [loss for name, loss in losses.items() if name != LIGER]
    low, high = min(exact), max(exact)
    models = [contestant.model for contestant in contestants.values()]
    by_kernels = any(isinstance(model, DynamicLoraModel) and model.kernels.names for model in models)
    near = abs(losses.get(LIGER, high) - high) <= NEAR_LOSS * abs(high)
    if not (high - low <= (SAME_LOSS_OF_KERNELS if by_kernels else SAME_LOSS) * abs(high) and near):
        raise RuntimeError(f"the contestants do not start as the same model: losses {losses}")


def check_gradients(contestants: dict[str, Contestant], rows: Tensor) -> None:
    """Check that every trained parameter gets a gradient, and that not all of them are 0.

    Raises:
        RuntimeError: a check failed.
    """
    for name, contestant in contestants.items():
        contestant.loss(rows).backward()
        missing = sum(parameter.grad is None for parameter in contestant.parameters)
        moved = sum(bool(parameter.grad.any()) for parameter in contestant.parameters if parameter.grad is not None)
        if contestant.parameters and (missing or not moved):
            raise RuntimeError(
                f"{name}: {missing} of {len(contestant.parameters)} parameters have no gradient, {moved} have one that "
                "is not 0"
            )
        contestant.model.zero_grad()
