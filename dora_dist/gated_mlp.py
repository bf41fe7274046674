"""A gated MLP of adapted linear layers as one differentiable operation: ``down(silu(gate(x)) * up(x))``.

Left to autograd, four tensors of the MLP's width are kept for the backward: the gate's output, its activation, the
output of ``up``, and their product, which the components of ``down`` read. Here it is two: activation and product are
computed again, elementwise. The gradients of ``x`` through ``gate`` and ``up`` add up in place.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from dora_dist import adapted_linear
from dora_dist.adapted_linear import Saved, input_gradient
from dora_dist.layer import DynamicLoraLinear
from dora_dist.quantization import product_dtype

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes what :func:`gated_mlp` does: the same code as transformers' Llama, with SiLU. Most
    models of this family have a copy of that class."""
    code, known = (getattr(type_.forward, "__code__", None) for type_ in (type(module), LlamaMLP))
    same = code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)
    return same and isinstance(module.act_fn, nn.SiLU | SiLUActivation)


def fuse_gated_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of a model whose three layers are all adapted run as one operation, in place."""
    for module in model.modules():
        if is_gated_mlp(module) and all(isinstance(layer, DynamicLoraLinear) for layer in _layers(module)):
            module.forward = MethodType(_forward, module)


def _layers(mlp: nn.Module) -> list[nn.Module]:
    return [getattr(mlp, name) for name in PROJECTIONS]


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    layers = _layers(mlp)
    # What a layer on its own would do, or tell others, has to happen.
    if any(layer.disable_adapters or layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return type(mlp).forward(mlp, x)
    return gated_mlp(x, *layers)


def gated_mlp(x: Tensor, gate: DynamicLoraLinear, up: DynamicLoraLinear, down: DynamicLoraLinear) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, differentiable once. Shape ``(..., in) -> (..., out)``."""
    layers = (gate, up, down)
    tensors = [tensor for layer in layers for tensor in (layer.lora_a, layer.gate, layer.lora_b)]
    return _GatedMlp.apply(x, *tensors, *(layer.settings() for layer in layers))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        tensors, settings = rest[:9], rest[9:]
        gate, gate_saved = adapted_linear.forward(x, *tensors[:3], settings[0])
        up, up_saved = adapted_linear.forward(x, *tensors[3:6], settings[1])
        product = functional.silu(gate).mul_(up)
        output, down_saved = adapted_linear.forward(product, *tensors[6:], settings[2])
        ctx.settings = settings
        outputs = zip(settings, (gate, up, output), strict=True)
        ctx.product_dtypes = [product_dtype(one.base, result) for one, result in outputs]
        ctx.save_for_backward(x, gate, up, *gate_saved, *up_saved, *down_saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *saved = ctx.saved_tensors
        gate_saved, up_saved, down_saved = (Saved(*saved[at : at + 5]) for at in (0, 5, 10))
        needs_x, *needs = ctx.needs_input_grad
        of_gate, of_up, of_down = ctx.settings
        gate_dtype, up_dtype, down_dtype = ctx.product_dtypes

        activation = functional.silu(gate)
        grad_product = input_gradient(grad_output, of_down.base, down_dtype)
        down_gradients = adapted_linear.backward(
            grad_output, activation * up, down_saved, of_down, needs[6:9], grad_product
        )
        grad_product = grad_product.to(gate.dtype).view(gate.shape)
        grad_up = activation.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        del activation, grad_product

        grad_x = None
        if needs_x:
            grad_x = input_gradient(grad_up, of_up.base, up_dtype)
        up_gradients = adapted_linear.backward(grad_up, x, up_saved, of_up, needs[3:6], grad_x)
        del grad_up
        if grad_x is not None:
            grad_x += input_gradient(grad_gate, of_gate.base, gate_dtype)
        gate_gradients = adapted_linear.backward(grad_gate, x, gate_saved, of_gate, needs[:3], grad_x)
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype).view(x.shape)
        return grad_x, *gate_gradients, *up_gradients, *down_gradients, None, None, None
