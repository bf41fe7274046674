"""A frozen linear map and its gated rank-one components as one differentiable operation.

``y = W0 x + s * sum_i c_i b_i (a_i . x)`` (equation 6 of Mao et al., 2024), written so that an adapter costs little
more than its products: the components are added to the base's output in place, gate and scale enter the small matrix,
and the backward adds to the base's input gradient in place. Why each of these, and what did not help:
``docs/performance.md``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.quantization import dequantized_weight, product_dtype


def adapted_linear(
    x: Tensor,
    base: nn.Module,
    lora_a: Tensor,
    gate: Tensor,
    lora_b: Tensor,
    scale: float,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Base layer plus components, differentiable once with respect to ``x`` and the three adapter tensors.

    Components are computed in the adapter's dtype, or in that of autocast where it is on.

    Args:
        x: shape ``(..., in)``.
        base: a frozen linear layer that :func:`dora_dist.quantization.dequantized_weight` knows.
        lora_a: rows ``a_i``, shape ``(r, in)``.
        gate: ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.
        scale: ``s``.
        kept: indices of the components that exist, shape ``(k,)``, int64; ``None`` for all. The others are not
            computed at all: they have no effect, and their gradients are exactly 0.
        dropout: probability with which an entry of ``x`` is dropped before the components, and before them only.

    Returns:
        Shape ``(..., out)`` in the base layer's output dtype.
    """
    return _AdaptedLinear.apply(x, lora_a, gate, lora_b, base, scale, kept, dropout)


class _AdaptedLinear(torch.autograd.Function):
    """Skinny operands are laid out along the long side (``r x tokens``), which CPU kernels take in half the time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        gate: Tensor,
        lora_b: Tensor,
        base: nn.Module,
        scale: float,
        kept: Tensor | None,
        dropout: float,
    ) -> Tensor:
        output = base(x)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        ctx.product_dtype = product_dtype(base, output)
        ctx.dtype = _component_dtype(x, lora_a)
        hidden = mask = None
        if kept is None or kept.numel():
            rows, mask = _drop(x.reshape(-1, x.shape[-1]).to(ctx.dtype), dropout)
            small_a, small_b = _small_matrices(lora_a, gate, lora_b, scale, kept, ctx.dtype)
            hidden = small_a @ rows.T
            _add_product(output.view(-1, output.shape[-1]), hidden.T, small_b.T.contiguous())
        ctx.save_for_backward(x, lora_a, gate, lora_b, kept, hidden, mask)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, gate, lora_b, kept, hidden, mask = ctx.saved_tensors
        needs_x, needs_a, needs_gate, needs_b, *_ = ctx.needs_input_grad
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_a = grad_gate = grad_b = None
        if needs_x:
            grad_x = grad.to(ctx.product_dtype) @ dequantized_weight(ctx.base, ctx.product_dtype)
        if hidden is None:
            grad_a, grad_gate, grad_b = (torch.zeros_like(tensor) for tensor in (lora_a, gate, lora_b))
        else:
            grad = grad.to(ctx.dtype)
            small_a, small_b = _small_matrices(lora_a, gate, lora_b, ctx.scale, kept, ctx.dtype)
            if needs_gate or needs_b:
                # (k, out): of c_i s b_i, from which those of c_i and b_i follow.
                grad_small = (hidden @ grad).to(lora_b.dtype)
                if needs_b:
                    grad_b = _spread(grad_small.T * (_kept(gate, 0, kept) * ctx.scale), 1, kept, lora_b)
                if needs_gate:
                    grad_gate = (grad_small * _kept(lora_b, 1, kept).T).sum(1) * ctx.scale
                    grad_gate = _spread(grad_gate.to(gate.dtype), 0, kept, gate)
            # (k, tokens), with the factor by which dropout scales what it leaves.
            grad_hidden = (small_b.T / (1 - ctx.dropout)) @ grad.T
            if needs_a:
                grad_small = grad_hidden @ _masked(x.reshape(-1, x.shape[-1]).to(ctx.dtype), mask)
                grad_a = _spread(grad_small.to(lora_a.dtype), 0, kept, lora_a)
            if grad_x is not None and mask is None:
                _add_product(grad_x, grad_hidden.T, small_a)
            elif grad_x is not None:
                grad_x.add_((grad_hidden.T @ small_a).mul_(mask))
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype).view(x.shape)
        return grad_x, grad_a, grad_gate, grad_b, None, None, None, None


def _component_dtype(x: Tensor, lora_a: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora_a.dtype


def _kept(tensor: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else tensor.index_select(dim, kept)


def _spread(grad: Tensor, dim: int, kept: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of all components from that of those kept."""
    return grad if kept is None else torch.zeros_like(like).index_copy_(dim, kept, grad)


def _small_matrices(
    lora_a: Tensor, gate: Tensor, lora_b: Tensor, scale: float, kept: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows ``a_i`` of shape ``(k, in)`` and columns ``s c_i b_i`` of shape ``(out, k)`` of the components kept."""
    columns = _kept(lora_b, 1, kept) * (_kept(gate, 0, kept) * scale)
    return _kept(lora_a, 0, kept).to(dtype), columns.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without a temporary where the dtypes are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _drop(rows: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(rows, dropout, True) if dropout else (rows, None)


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """What dropout left, unscaled, a second time: the mask is kept, a byte an entry, and not its product."""
    return rows if mask is None else rows * mask
