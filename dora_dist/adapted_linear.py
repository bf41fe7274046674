"""A frozen linear map and its gated rank-one components as one differentiable operation.

``y = W0 x + s * sum_i c_i b_i (a_i . x)`` (equation 6 of Mao et al., 2024), written so that an adapter costs little
more than its products: the components are added to the base's output in place, gate and scale enter the small matrix,
and the backward adds to the base's input gradient in place. Why each of these, and what did not help:
``docs/performance.md``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.quantization import dequantized_weight, product_dtype


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a layer computes with, beside tensors that have gradients.

    Args:
        base: a frozen linear layer that :func:`dora_dist.quantization.dequantized_weight` knows.
        scale: ``s``.
        kept: indices of the components that exist, shape ``(k,)``, int64; ``None`` for all. The others are not
            computed at all: they have no effect, and their gradients are exactly 0.
        dropout: probability with which an entry of ``x`` is dropped before the components, and before them only.
    """

    base: nn.Module
    scale: float
    kept: Tensor | None = None
    dropout: float = 0.0


class Saved(NamedTuple):
    """What :func:`forward` leaves for :func:`backward`, beside the layer's input."""

    lora_a: Tensor
    gate: Tensor
    lora_b: Tensor
    hidden: Tensor | None
    """``a_i . x``, shape ``(k, tokens)``, in the components' dtype; None where there are no components."""
    mask: Tensor | None
    """Of dropout, shape ``(tokens, in)``, a byte an entry."""


def adapted_linear(x: Tensor, lora_a: Tensor, gate: Tensor, lora_b: Tensor, settings: Settings) -> Tensor:
    """Base layer plus components, differentiable once with respect to ``x`` and the three adapter tensors.

    Components are computed in the adapter's dtype, or in that of autocast where it is on.

    Args:
        x: shape ``(..., in)``.
        lora_a: rows ``a_i``, shape ``(r, in)``.
        gate: ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.
        settings: all else.

    Returns:
        Shape ``(..., out)`` in the base layer's output dtype.
    """
    return _AdaptedLinear.apply(x, lora_a, gate, lora_b, settings)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, gate: Tensor, lora_b: Tensor, settings: Settings) -> Tensor:
        output, saved = forward(x, lora_a, gate, lora_b, settings)
        ctx.settings, ctx.product_dtype = settings, product_dtype(settings.base, output)
        ctx.save_for_backward(x, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        needs_x, *needs, _ = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            grad_x = input_gradient(grad_output, ctx.settings.base, ctx.product_dtype)
        gradients = backward(grad_output, x, Saved(*saved), ctx.settings, needs, grad_x)
        return None if grad_x is None else grad_x.to(x.dtype).view(x.shape), *gradients, None


def forward(x: Tensor, lora_a: Tensor, gate: Tensor, lora_b: Tensor, settings: Settings) -> tuple[Tensor, Saved]:
    """Output of :func:`adapted_linear`, and what :func:`backward` needs. Without autograd.

    Skinny operands are laid out along the long side (``k x tokens``), which CPU kernels take in half the time.
    """
    output = settings.base(x)
    hidden = mask = None
    if settings.kept is None or settings.kept.numel():
        dtype = _component_dtype(x, lora_a)
        rows, mask = _drop(_rows(x).to(dtype), settings.dropout)
        small_a, small_b = _small_matrices(lora_a, gate, lora_b, settings, dtype)
        hidden = small_a @ rows.T
        _add_product(output.view(-1, output.shape[-1]), hidden.T, small_b.T.contiguous())
    return output, Saved(lora_a, gate, lora_b, hidden, mask)


def input_gradient(grad_output: Tensor, base: nn.Module, dtype: torch.dtype) -> Tensor:
    """``grad_output @ W0`` in the dtype in which the base multiplies, shape ``(tokens, in)``."""
    return _rows(grad_output).to(dtype) @ dequantized_weight(base, dtype)


def backward(
    grad_output: Tensor, x: Tensor, saved: Saved, settings: Settings, needs: list[bool], grad_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the three adapter tensors; adds the components' part to the gradient of ``x`` in place.

    Args:
        grad_output: of the output, shape ``(..., out)``.
        x: the input again, shape ``(..., in)``.
        saved: of :func:`forward`.
        settings: the same as then.
        needs: whether ``lora_a``, ``gate`` and ``lora_b`` need a gradient.
        grad_x: shape ``(tokens, in)``, to be added to; None where it is not needed.
    """
    lora_a, gate, lora_b, hidden, mask = saved
    needs_a, needs_gate, needs_b = needs
    kept, scale = settings.kept, settings.scale
    if hidden is None:
        return torch.zeros_like(lora_a), torch.zeros_like(gate), torch.zeros_like(lora_b)
    grad_a = grad_gate = grad_b = None
    dtype = hidden.dtype
    grad = _rows(grad_output).to(dtype)
    small_a, small_b = _small_matrices(lora_a, gate, lora_b, settings, dtype)
    if needs_gate or needs_b:
        # (k, out): of c_i s b_i, from which those of c_i and b_i follow.
        grad_small = (hidden @ grad).to(lora_b.dtype)
        if needs_b:
            grad_b = _spread(grad_small.T * (_kept(gate, 0, kept) * scale), 1, kept, lora_b)
        if needs_gate:
            grad_gate = (grad_small * _kept(lora_b, 1, kept).T).sum(1) * scale
            grad_gate = _spread(grad_gate.to(gate.dtype), 0, kept, gate)
    # (k, tokens), with the factor by which dropout scales what it leaves.
    grad_hidden = (small_b.T / (1 - settings.dropout)) @ grad.T
    if needs_a:
        grad_small = grad_hidden @ _masked(_rows(x).to(dtype), mask)
        grad_a = _spread(grad_small.to(lora_a.dtype), 0, kept, lora_a)
    if grad_x is not None and mask is None:
        _add_product(grad_x, grad_hidden.T, small_a)
    elif grad_x is not None:
        grad_x.add_((grad_hidden.T @ small_a).mul_(mask))
    return grad_a, grad_gate, grad_b


def _rows(tensor: Tensor) -> Tensor:
    """Shape ``(tokens, features)``."""
    return tensor.reshape(-1, tensor.shape[-1])


def _component_dtype(x: Tensor, lora_a: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora_a.dtype


def _kept(tensor: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else tensor.index_select(dim, kept)


def _spread(grad: Tensor, dim: int, kept: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of all components from that of those kept."""
    return grad if kept is None else torch.zeros_like(like).index_copy_(dim, kept, grad)


def _small_matrices(
    lora_a: Tensor, gate: Tensor, lora_b: Tensor, settings: Settings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows ``a_i`` of shape ``(k, in)`` and columns ``s c_i b_i`` of shape ``(out, k)`` of the components kept."""
    kept = settings.kept
    columns = _kept(lora_b, 1, kept) * (_kept(gate, 0, kept) * settings.scale)
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
