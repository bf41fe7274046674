"""Loads a run's adapter, plain LoRA or prompt-routed."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dora_dist.adapter.plain_lora import read_new_rows
from dora_dist.base_model.new_tokens import fit_rows
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.routing.files import RoutedAdapter, is_routed, read_routed_adapter
from dora_dist.routing.model import RoutedLoraForCausalLM, add_routed_lora


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Load the adapter of a run onto its base, for use: frozen, in evaluation mode. A base that has no rows for the
    adapter's new tokens gets them.

    Args:
        base: the model that the adapter was trained on; changed in place.
        folder: folder of the adapter: plain LoRA, which PEFT reads, or a prompt-routed one, which PEFT cannot read.

    Raises:
        ValueError: the folder holds no adapter, one in another format, or one for another base.
    """
    folder = Path(folder)
    if is_routed(folder):
        return _with_routed_adapter(base, folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter: give the folder adapter/ of a run, or one of its checkpoints")
    new_rows = read_new_rows(folder)
    if new_rows is not None:
        fit_rows(base, new_rows.ids)
    model: PeftModel = PeftModel.from_pretrained(base, str(folder))
    return model.eval()


def _with_routed_adapter(base: PreTrainedModel, folder: Path) -> RoutedLoraForCausalLM:
    saved = read_routed_adapter(folder)
    _check_base(base, saved, folder)
    config = DynamicLoraConfig(
        target_rank=saved.rank,
        initial_rank=saved.rank,
        alpha=float(saved.rank),  # the factors are folded: scale 1
        dropout=0.0,
        target_modules=sorted(saved.factors),
        routing="prompt",
        modules_per_prompt=saved.modules_per_prompt,
    )
    model = add_routed_lora(base, config)
    if model.blocks != saved.blocks:
        raise ValueError(f"the adapter in {folder} has its modules in other blocks than this {type(base).__name__}")
    with torch.no_grad():
        for name, layer in model.adapted_layers().items():
            lora_a, lora_b = saved.factors[name]
            layer.lora_a.copy_(lora_a)
            layer.lora_b.copy_(lora_b)
        model.routers.load_state_dict(dict(saved.routers))
    return model.requires_grad_(False).eval()


def _check_base(base: PreTrainedModel, saved: RoutedAdapter, folder: Path) -> None:
    linears = dict(base.named_modules())
    for name, (lora_a, lora_b) in saved.factors.items():
        sizes = tuple(getattr(linears.get(name), size, None) for size in ("in_features", "out_features"))
        if sizes != (lora_a.shape[1], lora_b.shape[0]):
            there = "x".join(map(str, sizes)) if name in linears else "not there"
            raise ValueError(
                f"the adapter in {folder} is for {name} of {lora_a.shape[1]}x{lora_b.shape[0]}, which is {there} in "
                f"this {type(base).__name__}: give the base that it was trained on"
            )
