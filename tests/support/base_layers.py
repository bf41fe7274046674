"""Frozen linear layers of every kind, with and without components, for tests."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.base_model.quantization import forbid_inference_packing

IN, OUT, RANK = 64, 32, 6
ALPHA = 8.0


def make_base(kind: str = "plain", out: int = OUT, width: int = IN, seed: int = 0, bias: bool = True) -> nn.Linear:
    """A layer of kind ``plain``, ``nf4`` or ``int8``, with random weights of the size of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) / 8
    if kind == "plain":
        base, parameter = nn.Linear(width, out, bias=bias), nn.Parameter(weight)
    elif kind == "nf4":
        base = Linear4bit(width, out, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        parameter = Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        base = Linear8bitLt(width, out, bias=bias, has_fp16_weights=False)
        parameter = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    base.weight = parameter
    if bias:
        base.bias = nn.Parameter(torch.randn(out, generator=generator))
    base.to("cpu").requires_grad_(False)  # quantizes
    forbid_inference_packing(base)
    return base


def adapt_layer(
    base: nn.Linear,
    rank: int = RANK,
    *,
    dropout: float = 0.0,
    init: str | None = None,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> DynamicLoraLinear:
    """The base with components, initialized with ``init``; without it, all adapter parameters are random, so that each
    has an effect."""
    config = SimpleNamespace(lora_dropout=dropout)
    layer = DynamicLoraLinear(base, "default", config=config, r=rank, lora_alpha=ALPHA)
    layer.initialize(init or "paper", seed=seed, name="layer", dtype=dtype)
    if init is None:
        with torch.no_grad():
            layer.gate.copy_(torch.linspace(-1, 2, rank))
    return layer


def drop_the_same(layers: Sequence[nn.Module]) -> list[Any]:
    """Let layers that are computed one after the other draw the same dropout, as they do where they are computed
    together. Returns the handles of the hooks."""
    states = []

    def remember(*_: Any) -> None:
        states[:] = [torch.get_rng_state()]

    def repeat(*_: Any) -> None:
        torch.set_rng_state(states[0])

    return [layer.register_forward_pre_hook(repeat if at else remember) for at, layer in enumerate(layers)]
