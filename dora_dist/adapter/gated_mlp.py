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

from dora_dist.adapter import linear_operation
from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.linear_operation import LinearSettings, LinearTensors, SavedForBackward, unpack
from dora_dist.base_model.shape import GATED_MLP, is_gated_mlp


def fuse_gated_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of a model whose three layers are all adapted run as one operation, in place."""
    for module in model.modules():
        if is_gated_mlp(module) and _layers(module) is not None:
            module.forward = MethodType(_forward, module)


def _layers(mlp: nn.Module) -> list[DynamicLoraLinear] | None:
    """Gate, up and down where all are adapted and can be computed as one; None otherwise."""
    layers = [getattr(mlp, name) for name in GATED_MLP]
    adapted = [layer for layer in layers if isinstance(layer, DynamicLoraLinear)]
    return adapted if len(adapted) == len(layers) and adapted[0].computes_as(adapted[1]) else None


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    # What a layer on its own would do, or tell others, has to happen; and layers may have been replaced.
    layers = _layers(mlp)
    if layers is None or any(layer.disable_adapters or _is_watched(layer) for layer in layers):
        alone: Tensor = type(mlp).forward(mlp, x)
        return alone
    return gated_mlp(x, *(layer.tensors() for layer in layers))


def _is_watched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(bool, hooks))


def gated_mlp(x: Tensor, gate: LinearTensors, up: LinearTensors, down: LinearTensors) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, differentiable once. Shape ``(..., in) -> (..., out)``."""
    layers = (gate, up, down)
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    settings = [layer.settings for layer in layers]
    # torch has no types for `apply`.
    bridge, product, *down_saved = _UntilProduct.apply(x, settings, *tensors)  # type: ignore[no-untyped-call]
    saved = SavedForBackward(*down_saved)
    output: Tensor = _FromProduct.apply(bridge, product, down.settings, saved)  # type: ignore[no-untyped-call]
    return output


class _UntilProduct(torch.autograd.Function):
    """All of the MLP but its output; its backward is that of the whole MLP.

    Gradient checkpointing computes a decoder layer again until it has all that was kept. As nothing is kept from here
    on, it stops before the product of ``down``'s base, a fifth of the layer, which no gradient needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: list[LinearSettings], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        layers = linear_operation.layers_of(tensors, settings)
        (gate, up), saved = linear_operation.forward(x, layers[:2])
        product = functional.silu(gate).mul_(up)
        (down_saved,) = linear_operation.read_input(product, layers[2:])
        # Stands for the output: the gradient of that one comes in as its gradient.
        bridge = product.new_zeros(()).expand(*x.shape[:-1], settings[2].base.out_features)
        ctx.settings = settings
        ctx.save_for_backward(x, gate, up, *(tensor for one in (*saved, down_saved) for tensor in one))
        # Detached: parameters are inputs here, which must not come out as outputs.
        handed_on = (product, *(None if tensor is None else tensor.detach() for tensor in down_saved))
        ctx.mark_non_differentiable(*(tensor for tensor in handed_on if tensor is not None))
        ctx.set_materialize_grads(False)  # there would be zeros for each of them
        return bridge, *handed_on

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, gate, up, *tensors = ctx.saved_tensors
        saved = unpack(tensors)
        needs_x, _, *needs = ctx.needs_input_grad

        activation = functional.silu(gate)
        grad_product, down_gradients = linear_operation.backward(
            [grad_output], activation * up, saved[2:], ctx.settings[2:], True, needs[6:]
        )
        assert grad_product is not None
        grad_up = activation.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        del activation, grad_product

        grad_x, gradients = linear_operation.backward(
            [grad_gate, grad_up], x, saved[:2], ctx.settings[:2], needs_x, needs[:6]
        )
        return grad_x, None, *gradients, *down_gradients


class _FromProduct(torch.autograd.Function):
    """The output of the MLP. Keeps nothing, and hands its gradient on to :class:`_UntilProduct`."""

    @staticmethod
    def forward(ctx: Any, bridge: Tensor, product: Tensor, settings: LinearSettings, saved: SavedForBackward) -> Tensor:
        return linear_operation.output_of(product, settings, saved)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, None, None, None
