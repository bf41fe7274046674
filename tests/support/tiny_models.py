"""Language models of a few thousand parameters, made on the spot without a network."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dora_dist import DynamicLoraConfig, add_dynamic_lora
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.kernels import NO_KERNELS, KernelsInUse
from dora_dist.base_model.load import BaseModelSpec, load_base_model
from dora_dist.base_model.quantization import quantization_config
from dora_dist.routing.model import RoutedLoraForCausalLM, add_routed_lora
from dora_dist.routing.router import Decision

VOCABULARY = 96
ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Sizes of a decoder of two blocks."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_config(architecture: str = "llama", **changes: object) -> PreTrainedConfig:
    sizes = {**SIZES, "max_position_embeddings": 64, "use_cache": False}
    return ARCHITECTURES[architecture](**{**sizes, **changes})


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model in float32, the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).eval()


def quantized_model(folder: Path, quantization: str) -> PreTrainedModel:
    """The model saved in ``folder`` as transformers quantizes it, without what ``load_base_model`` does on top."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization_config(quantization, torch.float32),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )


def load_base(folder: Path | str, quantization: str = "nf4", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model saved in ``folder``, as a run loads it."""
    return load_base_model(BaseModelSpec(path=str(folder), quantization=quantization, compute_dtype=dtype))


def save_stored(folder: Path, base: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save ``base`` quantized to NF4, by stock transformers; ``changes`` are settings of the quantization."""
    config = quantization_config("nf4", dtype)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(folder)
    return folder


def adapt(
    base: nn.Module, fuse: bool = True, kernels: KernelsInUse = NO_KERNELS, **changes: object
) -> DynamicLoraModel:
    """The base with an adapter, with small ranks and no dropout unless ``changes`` say otherwise."""
    config = DynamicLoraConfig(**{"target_rank": 2, "dropout": 0.0, "seed": 5, **changes})
    return add_dynamic_lora(base, config, fuse, kernels)


def routed(base: PreTrainedModel | None = None, modules: int = 3, **changes: object) -> RoutedLoraForCausalLM:
    """A model whose prompts choose ``modules`` of the seven of every block, with random values for all parameters, such
    that the prompts differ in what they choose."""
    ranks = {"target_rank": 2, "initial_rank": 2, "alpha": 2.0, "dropout": 0.0, "seed": 5}
    config = DynamicLoraConfig(**{**ranks, "routing": "prompt", "modules_per_prompt": modules, **changes})
    model = shake(add_routed_lora(tiny_model() if base is None else base, config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.routers.parameters():
            parameter.copy_(10 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def decisions(model: RoutedLoraForCausalLM) -> list[Decision]:
    """The decisions of every block in the latest forward."""
    return [model.routing.decisions[number] for number in range(len(model.routers))]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def shake(model: DynamicLoraModel, seed: int = 1) -> DynamicLoraModel:
    """Set all adapter parameters to random values, so that every component has an effect and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.adapted_layers().values():
        for parameter in (layer.lora_a, layer.gate, layer.lora_b):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def add_unreached_layer(model: DynamicLoraModel) -> None:
    """Add an adapted layer that the model never calls."""
    layer = copy.deepcopy(model.adapted_layers()["model.layers.1.mlp.down_proj"])
    model.get_submodule("base_model.model.model.layers.1.mlp").unused = layer


def tokens(rows: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def loss_and_gradients(model: nn.Module, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on ``ids``, and the gradients of all trainable parameters by name; every one must have one."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def adamw_losses(model: nn.Module, steps: int) -> Iterator[Tensor]:
    """Train, and yield the loss of every step after that step has been taken."""
    # Its default eps of 1e-8 would turn float32 rounding of gradients near 0 into steps of any size up to lr.
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.01, eps=1e-5)
    model.train()
    for step in range(steps):
        loss, _ = loss_and_gradients(model, tokens(seed=100 + step))
        optimizer.step()
        yield loss
