"""PEFT's AdaLoRA, for causal language models and sequence classification.

It runs in one process without an engine, because under ZeRO no callback of the Trainer can drive it (docs/method.md).
Specific to AdaLoRA are its importance (sensitivity times uncertainty), its cubic schedule, which prunes fast at first,
and its orthogonal regularizer. Two things differ from PEFT, to compare methods and not loops: the regularizer, which
PEFT adds to every micro-batch, counts once per optimizer step, and evaluation uses the task's loss alone.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from dora_dist.base_model.head import head_modules
from dora_dist.compare.methods import ADALORA, PEER_TITLES
from dora_dist.compare.peers.training import Factors, is_mean_of_rows
from dora_dist.compare.settings import AdaLoraSettings
from dora_dist.config.tasks import TASKS
from dora_dist.console.errors import ExpectedRunError
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.setup import resolve

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig

RANK_EPSILON = 1e-5
"""PEFT adds this to the rank that it divides by."""


class AdaLora:
    """AdaLoRA with the ranks, layers, scale and phases of a run: pruning begins after the same warm-up and ends after
    the same step.

    Args:
        settings: AdaLoRA's own settings; an interval of None means that of ``pruning``.
    """

    title = PEER_TITLES[ADALORA]

    def __init__(self, settings: AdaLoraSettings) -> None:
        self._settings = settings

    @property
    def own(self) -> Mapping[str, Any]:
        return self._settings.named()

    def adapted(self, config: "RunConfig", resolved: resolve.ResolvedRun, base: PreTrainedModel) -> PeftModel:
        # How often an optimizer step includes the full regularizer.
        regularizers = 1 if is_mean_of_rows(config) else resolved.arguments.gradient_accumulation_steps
        own, schedule = self._settings, _schedule(resolved)
        peft_config = AdaLoraConfig(
            init_r=schedule.initial_rank,
            target_r=schedule.target_rank,
            tinit=int(schedule.total_steps * schedule.warmup_fraction),
            tfinal=schedule.total_steps - schedule.final_step,
            deltaT=own.interval or schedule.interval,
            total_step=schedule.total_steps,
            beta1=own.beta1,
            beta2=own.beta2,
            # PEFT adds it to every micro-batch's loss. PEFT before 0.20 refuses 0; in float32, this value is 0.
            orth_reg_weight=own.orth_reg_weight / regularizers or sys.float_info.min,
            # PEFT divides by init_r for the whole run, and multiplies by this; its type is an int.
            lora_alpha=config.adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=config.adapter.dropout,
            target_modules=list(resolved.initial_ranks),
            modules_to_save=list(head_modules(base)) or None,  # PEFT adds names to it
            task_type=TASKS[config.task].peft_type,
        )
        return cast(PeftModel, get_peft_model(base, peft_config))

    def after_gradients(self, model: PeftModel, step: int) -> None:
        cast(AdaLoraModel, model.base_model).update_and_allocate(step)

    def kept(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Mapping[str, Tensor]:
        return kept_triplets(model)

    def factors(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Factors:
        factors = folded_triplets(model, kept_triplets(model))
        check_budget(factors, _schedule(resolved))
        return factors


def _schedule(resolved: resolve.ResolvedRun) -> BudgetSchedule:
    schedule = resolved.budget.schedule
    assert isinstance(schedule, BudgetSchedule), "AdaLoRA prunes"
    return schedule


def _layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    found = {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)
    }
    return dict(sorted(found.items()))


def kept_triplets(model: PeftModel) -> dict[str, Tensor]:
    """Layer -> boolean mask, shape ``(r,)``, of the triplets that AdaLoRA has not pruned, by its own record. All True
    before its first event."""
    pattern = cast(AdaLoraConfig, model.peft_config["default"]).rank_pattern
    if pattern is None:
        return {name: torch.ones(len(layer.lora_E["default"])).bool() for name, layer in _layers(model).items()}
    masks = {name.split(".lora_E")[0]: mask for name, mask in pattern.items()}
    return {name: torch.tensor(masks[name], dtype=torch.bool) for name in _layers(model)}


@torch.no_grad()
def folded_triplets(model: PeftModel, kept: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain LoRA factors ``(A (k, in), B (out, k))`` by layer; singular values and scale are folded into B."""
    factors = {}
    for name, layer in _layers(model).items():
        scale = layer.scaling["default"] / (layer.ranknum["default"] + RANK_EPSILON)
        a, e, b = (getattr(layer, f"lora_{part}")["default"].float() for part in "AEB")
        chosen = kept[name]
        factors[name] = (a[chosen].cpu().contiguous(), (b[:, chosen] * (e[chosen, 0] * scale)).cpu().contiguous())
    return factors


def check_budget(factors: Factors, schedule: BudgetSchedule) -> None:
    """Refuse an adapter that is larger than its budget.

    Raises:
        ExpectedRunError: more triplets remain than the budget allows.
    """
    left = sum(a.shape[0] for a, _ in factors.values())
    if left > schedule.final_num_kept:
        raise ExpectedRunError(f"AdaLoRA has kept {left} triplets instead of the budget {schedule.final_num_kept}")
