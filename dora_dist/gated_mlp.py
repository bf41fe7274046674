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

from dora_dist import adapted_linear
from dora_dist.adapted_linear import Layer, Settings, unpack
from dora_dist.layer import DynamicLoraLinear
from dora_dist.model_shape import GATED_MLP, is_gated_mlp
from dora_dist.quantization import product_dtype


def fuse_gated_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of a model whose three layers are all adapted run as one operation, in place."""
    for module in model.modules():
        if is_gated_mlp(module) and _can_be_fused(module):
            module.forward = MethodType(_forward, module)


def _layers(mlp: nn.Module) -> list[nn.Module]:
    return [getattr(mlp, name) for name in GATED_MLP]


def _can_be_fused(mlp: nn.Module) -> bool:
    gate, up, down = _layers(mlp)
    return all(isinstance(layer, DynamicLoraLinear) for layer in (gate, up, down)) and gate.computes_as(up)


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    # What a layer on its own would do, or tell others, has to happen; and layers may have been replaced.
    if not _can_be_fused(mlp) or any(layer.disable_adapters or _is_watched(layer) for layer in _layers(mlp)):
        return type(mlp).forward(mlp, x)
    return gated_mlp(x, *(layer.tensors() for layer in _layers(mlp)))


def _is_watched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(bool, hooks))


def gated_mlp(x: Tensor, gate: Layer, up: Layer, down: Layer) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, differentiable once. Shape ``(..., in) -> (..., out)``."""
    layers = (gate, up, down)
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    return _GatedMlp.apply(x, [layer.settings for layer in layers], *tensors)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: list[Settings], *tensors: Tensor) -> Tensor:
        layers = [Layer(*tensors[3 * at : 3 * at + 3], one) for at, one in enumerate(settings)]
        (gate, up), saved = adapted_linear.forward(x, layers[:2])
        product = functional.silu(gate).mul_(up)
        (output,), down_saved = adapted_linear.forward(product, layers[2:])
        ctx.settings = settings
        ctx.product_dtypes = product_dtype(settings[0].base, gate), product_dtype(settings[2].base, output)
        ctx.save_for_backward(x, gate, up, *(tensor for one in (*saved, *down_saved) for tensor in one))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *tensors = ctx.saved_tensors
        saved = unpack(tensors)
        needs_x, _, *needs = ctx.needs_input_grad
        first_dtype, down_dtype = ctx.product_dtypes

        activation = functional.silu(gate)
        grad_product, down_gradients = adapted_linear.backward(
            [grad_output], activation * up, saved[2:], ctx.settings[2:], down_dtype, True, needs[6:]
        )
        grad_up = activation.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        del activation, grad_product

        grad_x, gradients = adapted_linear.backward(
            [grad_gate, grad_up], x, saved[:2], ctx.settings[:2], first_dtype, needs_x, needs[:6]
        )
        return grad_x, None, *gradients, *down_gradients
