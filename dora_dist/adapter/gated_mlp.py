"""A gated MLP of adapted linear layers as one differentiable operation: ``down(silu(gate(x)) * up(x))``.

Left to autograd, four tensors of the MLP's width are kept for the backward: the gate's output, its activation, the
output of ``up``, and their product, which the components of ``down`` read. Here it is two: activation and product are
computed again, elementwise. The gradients of ``x`` through ``gate`` and ``up`` add up in place.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.adapter import linear_operation
from dora_dist.adapter.components import Operands
from dora_dist.adapter.layer import DynamicLoraLinear, frozen, operands
from dora_dist.adapter.linear_operation import Frozen, unpack
from dora_dist.base_model.kernels import Swiglu
from dora_dist.base_model.shape import GATED_MLP, is_gated_mlp


def fuse_gated_mlps(model: nn.Module, swiglu: Swiglu) -> list[list[DynamicLoraLinear]]:
    """Let gated MLPs of a model run as one operation, if all three of their layers are adapted; in place.

    Args:
        model: the model, with its adapter.
        swiglu: implementation of the elementwise part.

    Returns:
        Gate and up of each such MLP, which read one tensor.
    """
    groups = []
    for module in model.modules():
        layers = _layers(module) if is_gated_mlp(module) else None
        if layers is not None:
            module.forward = MethodType(partial(_forward, swiglu=swiglu), module)
            groups.append(layers[:2])
    return groups


def _layers(mlp: nn.Module) -> list[DynamicLoraLinear] | None:
    """Gate, up and down, if all are adapted and can be computed as one; None otherwise."""
    layers = [getattr(mlp, name) for name in GATED_MLP]
    adapted = [layer for layer in layers if isinstance(layer, DynamicLoraLinear)]
    return adapted if len(adapted) == len(layers) and adapted[0].computes_as(adapted[1]) else None


def _forward(mlp: nn.Module, x: Tensor, swiglu: Swiglu) -> Tensor:
    # Hooks of a layer have to run; the adapter may be switched off, or layers replaced.
    layers = _layers(mlp)
    if layers is None or any(layer.disable_adapters or _is_watched(layer) for layer in layers):
        alone: Tensor = type(mlp).forward(mlp, x)
        return alone
    gate, up, down = layers
    return gated_mlp(x, operands([gate, up]), frozen([gate, up]), operands([down]), frozen([down]), swiglu)


def _is_watched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(bool, hooks))


def gated_mlp(
    x: Tensor, outer: Operands, outer_frozen: Frozen, down: Operands, down_frozen: Frozen, swiglu: Swiglu
) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, differentiable once. Shape ``(..., in) -> (..., out)``.

    Args:
        x: the input, shape ``(..., in)``.
        outer: operands of gate and up.
        outer_frozen: base layers and dropout of gate and up.
        down: operands of down.
        down_frozen: base layer and dropout of down.
        swiglu: implementation of ``silu(gate) * up``.

    Raises:
        RuntimeError: a backward is run twice, and ``swiglu`` has overwritten in the first one what it reads.
    """
    # torch has no types for `apply`.
    bridge, product, hidden = _UntilProduct.apply(  # type: ignore[no-untyped-call]
        x, outer_frozen, down_frozen, swiglu, outer.rows, *outer.columns, down.rows, *down.columns
    )
    (base,), (columns,) = down_frozen.bases, down.columns
    # The gradient of the columns is made in the backward of the other operation.
    output: Tensor = _FromProduct.apply(bridge, product, base, hidden, columns.detach())  # type: ignore[no-untyped-call]
    return output


class _UntilProduct(torch.autograd.Function):
    """All of the MLP but its output; its backward is that of the whole MLP.

    Gradient checkpointing computes a decoder layer again until it has everything that the forward saved. As nothing is
    saved after this operation, it stops before the product of ``down``'s base, a fifth of the layer, which no gradient
    needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        outer_frozen: Frozen,
        down_frozen: Frozen,
        swiglu: Swiglu,
        rows: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        *columns, down_rows, down_columns = others
        (gate, up), saved = linear_operation.forward(x, Operands(rows, tuple(columns)), outer_frozen)
        product = swiglu.product(gate, up)
        down = linear_operation.read_input(product, Operands(down_rows, (down_columns,)), down_frozen.dropout)
        # Stands for the output and is not read: the output's gradient comes in as the gradient of this tensor.
        bridge = product.new_empty(()).expand(*x.shape[:-1], down_frozen.bases[0].out_features)
        ctx.frozen = outer_frozen, down_frozen
        ctx.swiglu, ctx.overwritten = swiglu, False
        ctx.num_saved = len(saved.flat())
        ctx.save_for_backward(x, gate, up, *saved.flat(), *down.flat())
        ctx.mark_non_differentiable(product, down.hidden)
        ctx.set_materialize_grads(False)  # otherwise, zeros would be made for each output without a gradient
        return bridge, product, down.hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward through a gated MLP: in the first one, the SwiGLU kernel has overwritten what it "
                "reads. Compute the forward again, or set model.kernels to none"
            )
        x, gate, up, *tensors = ctx.saved_tensors
        saved, saved_down = unpack(tensors[: ctx.num_saved]), unpack(tensors[ctx.num_saved :])
        outer_frozen, down_frozen = ctx.frozen
        needs_x, _, _, _, *needs = ctx.needs_input_grad

        product, activation = ctx.swiglu.product_again(gate, up)
        # Taken apart, so that the gradient of the product is gone before that of the input is made.
        grad_product, down_rows, down_columns = linear_operation.backward(
            [grad_output], product, saved_down, down_frozen, True, needs[3:]
        )
        del product
        assert grad_product is not None
        ctx.overwritten = ctx.swiglu.overwrites
        grads = ctx.swiglu.gradients(grad_product, gate, up, activation)
        del activation, grad_product

        outer = linear_operation.backward(grads, x, saved, outer_frozen, needs_x, needs[:3])
        return outer.x, None, None, None, outer.rows, *outer.columns, down_rows, *down_columns


class _FromProduct(torch.autograd.Function):
    """The output of the MLP. It saves nothing, and hands its gradient on to :class:`_UntilProduct`."""

    @staticmethod
    def forward(ctx: Any, bridge: Tensor, product: Tensor, base: nn.Linear, hidden: Tensor, columns: Tensor) -> Tensor:
        return linear_operation.output_of(product, base, hidden, columns)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, None, None, None, None
