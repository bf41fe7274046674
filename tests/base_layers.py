"""Frozen linear layers of every kind, for tests."""

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from dora_dist.quantization import forbid_inference_packing

IN, OUT, RANK = 64, 32, 6


def make_base(kind: str = "plain") -> nn.Linear:
    plain = nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(OUT, IN, generator=generator) / 8, torch.randn(OUT, generator=generator)
    if kind == "plain":
        base, parameter = plain, nn.Parameter(weight)
    elif kind == "nf4":
        base = Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
        parameter = Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        base = Linear8bitLt(IN, OUT, has_fp16_weights=False)
        parameter = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    base.weight = parameter
    base.bias = nn.Parameter(bias)
    base.to("cpu").requires_grad_(False)  # quantizes
    forbid_inference_packing(base)
    return base
