"""Modules with the names and signatures of Liger's, in torch's operations, for machines where its kernels cannot
run."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def rms_norm(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gate, up, functional.silu(gate) * up


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


def install() -> None:
    """Put the modules in place of Liger's, for the rest of this process."""
    contents = {
        "rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=rms_norm)},
        "rope": {"LigerRopeFunction": SimpleNamespace(apply=apply_rotary_pos_emb)},
        "swiglu": {"swiglu_forward": swiglu_forward, "swiglu_backward": swiglu_backward},
    }
    modules = {"liger_kernel": {}, "liger_kernel.ops": {}}
    modules |= {f"liger_kernel.ops.{name}": content for name, content in contents.items()}
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        sys.modules[name] = module
