"""PEFT's EVA (Paischl et al., 2024), for causal language models: LoRA that starts along the principal directions of the
layers' inputs, with ranks by how much of a layer's input each direction explains.

PEFT computes both from training rows before the first step; ranks do not change later. It counts ranks, not parameters:
the total differs from that of the run's uniform rank where rank moves between wide and narrow layers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from dora_dist.compare.methods import EVA, PEER_TITLES
from dora_dist.compare.peers.training import Factors
from dora_dist.config.tasks import TASKS
from dora_dist.data.batches import PaddedCollator
from dora_dist.setup import resolve
from dora_dist.setup.tasks import TASK_PARTS
from dora_dist.training.from_data.start import spread

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig


class Eva:
    """EVA with PEFT's defaults, on ``adapter.calibration_rows`` rows that are spread over the training data and read in
    micro-batches of the run's size."""

    title = PEER_TITLES[EVA]
    own: Mapping[str, Any] = {}

    def adapted(self, config: "RunConfig", resolved: resolve.ResolvedRun, base: PreTrainedModel) -> PeftModel:
        peft_config = LoraConfig(
            r=config.adapter.target_rank,
            # PEFT multiplies by it; its type is an int. PEFT scales it with a layer's rank, so alpha / r is constant.
            lora_alpha=config.adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=config.adapter.dropout,
            target_modules=list(resolved.initial_ranks),
            init_lora_weights="eva",
            eva_config=EvaConfig(),
            task_type=TASKS[config.task].peft_type,
        )
        model = cast(PeftModel, get_peft_model(base, peft_config))
        rows = TASK_PARTS[config.task].training_rows(resolved)
        # One example per row, even if the data are packed: PEFT's padding mask does not support packing.
        examples = [[one] for number in spread(config.adapter.calibration_rows, len(rows)) for one in rows[number]]
        size, collate = resolved.arguments.per_device_train_batch_size, PaddedCollator(resolved.tokenizer)
        batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return model

    def after_gradients(self, model: PeftModel, step: int) -> None:
        pass

    def kept(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Mapping[str, Tensor]:
        ranks = {name: layer.r["default"] for name, layer in _layers(model).items()}
        return {name: torch.ones(ranks.get(name, 0), dtype=torch.bool) for name in resolved.initial_ranks}

    @torch.no_grad()
    def factors(self, model: PeftModel, resolved: resolve.ResolvedRun) -> Factors:
        factors = {}
        for name, layer in _layers(model).items():
            a, b = (getattr(layer, f"lora_{part}")["default"].weight.float().cpu() for part in "AB")
            factors[name] = a.contiguous(), (b * layer.scaling["default"]).contiguous()
        return factors


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    found = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    return dict(sorted(found.items()))
