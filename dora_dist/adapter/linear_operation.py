"""Frozen linear maps that read one input, and their gated rank-one components, as one differentiable operation.

``y = W0 x + s * sum_i c_i b_i (a_i . x)`` (equation 6 of Mao et al., 2024), written so that an adapter costs little
more than its products: the components are added to the base's output in place, gate and scale enter the small matrix,
the backward adds to the base's input gradient in place, and layers that read the same tensor (q, k and v; gate and up)
read it once. Why each of these, and what did not help: ``docs/performance.md``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.base_model.quantization import dequantized_weight, product_dtype


class LinearSettings(NamedTuple):
    """What a layer computes with, beside tensors that have gradients."""

    base: nn.Linear
    """A frozen linear layer that :func:`dora_dist.base_model.quantization.dequantized_weight` knows."""
    scale: float
    """``s``."""
    kept: Tensor | None = None
    """Indices of the components that exist, shape ``(k,)``, int64; ``None`` for all. The others are not computed at
    all: they have no effect, and their gradients are exactly 0."""
    dropout: float = 0.0
    """Probability with which an entry of ``x`` is dropped before the components, and before them only."""


class LinearTensors(NamedTuple):
    """Rows ``a_i`` (r, in), ``c_i`` (r,), columns ``b_i`` (out, r), and the rest."""

    lora_a: Tensor
    gate: Tensor
    lora_b: Tensor
    settings: LinearSettings


class SavedForBackward(NamedTuple):
    """What the forward of a layer leaves for its backward, beside the input."""

    gate: Tensor
    lora_b: Tensor
    small_a: Tensor
    """Rows ``a_i`` of the components kept, shape ``(k, in)``, in the components' dtype."""
    small_b: Tensor
    """Columns ``s c_i b_i`` of the components kept, shape ``(out, k)``, in the components' dtype."""
    hidden: Tensor
    """``a_i . x``, shape ``(k, tokens)``: skinny operands lie along the long side, which CPU kernels take in half the
    time."""
    mask: Tensor | None
    """Of dropout, shape ``(tokens, in)``, a byte an entry."""


def adapted_linears(x: Tensor, layers: Sequence[LinearTensors]) -> tuple[Tensor, ...]:
    """Base layer plus components of every layer, differentiable once in ``x`` and the adapters' tensors.

    Components are computed in the adapter's dtype, or in that of autocast where it is on.

    Args:
        x: shape ``(..., in)``.
        layers: that read it.

    Returns:
        For each, shape ``(..., out)`` in the base layer's output dtype.
    """
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    settings = [layer.settings for layer in layers]
    # torch has no types for `apply`.
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, settings, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: list[LinearSettings], *tensors: Tensor) -> tuple[Tensor, ...]:
        layers = layers_of(tensors, settings)
        outputs, saved = forward(x, layers)
        ctx.settings = settings
        ctx.save_for_backward(x, *(tensor for one in saved for tensor in one))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        saved = unpack(tensors)
        grad_x, gradients = backward(grad_outputs, x, saved, ctx.settings, needs_x, needs)
        return grad_x, None, *gradients


def layers_of(tensors: Sequence[Tensor], settings: Sequence[LinearSettings]) -> list[LinearTensors]:
    """Layers from one flat list of their tensors, three of each."""
    parts = zip(tensors[::3], tensors[1::3], tensors[2::3], settings, strict=True)
    return [LinearTensors(lora_a, gate, lora_b, one) for lora_a, gate, lora_b, one in parts]


def unpack(tensors: Sequence[Tensor | None]) -> list[SavedForBackward]:
    """What layers saved, from one flat list."""
    size = len(SavedForBackward._fields)
    return [SavedForBackward._make(tensors[at : at + size]) for at in range(0, len(tensors), size)]


def forward(x: Tensor, layers: Sequence[LinearTensors]) -> tuple[list[Tensor], list[SavedForBackward]]:
    """Outputs of :func:`adapted_linears`, and what :func:`backward` needs. Without autograd."""
    saved = read_input(x, layers)
    return [output_of(x, layer.settings, one) for layer, one in zip(layers, saved, strict=True)], saved


def read_input(x: Tensor, layers: Sequence[LinearTensors]) -> list[SavedForBackward]:
    """What the components of layers make of their input: all that the backward needs, but no output yet."""
    dtype = _component_dtype(x, layers[0].lora_a)
    rows = _rows(x).to(dtype)
    small = [_small_matrices(layer, dtype) for layer in layers]
    masks: list[Tensor | None] = [None] * len(layers)
    if any(layer.settings.dropout for layer in layers):
        hidden = []
        for at, layer in enumerate(layers):
            dropped, masks[at] = torch.native_dropout(rows, layer.settings.dropout, True)
            hidden.append(small[at][0] @ dropped.T)
    else:
        hidden = list((_stacked([a for a, _ in small]) @ rows.T).split([len(a) for a, _ in small]))
    return [
        SavedForBackward(layer.gate, layer.lora_b, *matrices, inner, mask)
        for layer, matrices, inner, mask in zip(layers, small, hidden, masks, strict=True)
    ]


def output_of(x: Tensor, settings: LinearSettings, saved: SavedForBackward) -> Tensor:
    """Base layer plus components, shape ``(..., out)``."""
    output: Tensor = settings.base(x)
    if len(saved.hidden):
        _add_product(output.view(-1, output.shape[-1]), saved.hidden.T, saved.small_b.T.contiguous())
    return output


def backward(
    grad_outputs: Sequence[Tensor],
    x: Tensor,
    saved: Sequence[SavedForBackward],
    settings: Sequence[LinearSettings],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of :func:`adapted_linears`.

    Args:
        grad_outputs: of every output, shape ``(..., out)``.
        x: the input again, shape ``(..., in)``.
        saved: of :func:`forward`.
        settings: of the layers, the same as then.
        needs_x: whether ``x`` needs a gradient.
        needs: whether ``lora_a``, ``gate`` and ``lora_b`` of the first layer do, then of the next.

    Returns:
        Gradient of ``x``, and those of the layers' tensors in the order of ``needs``; None where not needed.
    """
    grad_x = _base_gradient(grad_outputs, settings) if needs_x else None
    dtype = saved[0].hidden.dtype
    gradients: list[Tensor | None] = [None] * len(needs)
    grad_hidden = []
    for at, (grad_output, one, layer) in enumerate(zip(grad_outputs, saved, settings, strict=True)):
        grad = _rows(grad_output).to(dtype)
        gradients[3 * at + 1 : 3 * at + 3] = _column_gradients(grad, one, layer, *needs[3 * at + 1 : 3 * at + 3])
        # (k, tokens), with the factor by which dropout scales what it leaves.
        grad_hidden.append((one.small_b.T / (1 - layer.dropout)) @ grad.T)
    rows = _rows(x).to(dtype)
    masks = [one.mask for one in saved if one.mask is not None]
    if not masks:
        together = _stacked(grad_hidden)
        small_gradients = (together @ rows).split([len(inner) for inner in grad_hidden])
        if grad_x is not None and len(together):
            _add_product(grad_x, together.T, _stacked([one.small_a for one in saved]))
    else:
        small_gradients = tuple(inner @ (rows * mask) for inner, mask in zip(grad_hidden, masks, strict=True))
        for inner, one, mask in zip(grad_hidden, saved, masks, strict=True):
            if grad_x is not None and len(inner):
                grad_x.add_((inner.T @ one.small_a).mul_(mask))
    for at, (small, one, layer) in enumerate(zip(small_gradients, saved, settings, strict=True)):
        if needs[3 * at]:
            shape = (len(one.gate), x.shape[-1])
            gradients[3 * at] = _spread(small.to(one.lora_b.dtype), 0, layer.kept, shape)
    return None if grad_x is None else grad_x.to(x.dtype).view(x.shape), gradients


def _base_gradient(grad_outputs: Sequence[Tensor], settings: Sequence[LinearSettings]) -> Tensor:
    """Sum of ``grad_output @ W0`` over the layers, shape ``(tokens, in)``."""
    dtype = product_dtype(settings[0].base, grad_outputs[0])
    total = _rows(grad_outputs[0]).to(dtype) @ dequantized_weight(settings[0].base, dtype)
    for grad_output, layer in zip(grad_outputs[1:], settings[1:], strict=True):
        # One dequantized weight at a time: none has a name.
        total.addmm_(_rows(grad_output).to(dtype), dequantized_weight(layer.base, dtype))
    return total


def _column_gradients(
    grad: Tensor, saved: SavedForBackward, settings: LinearSettings, needs_gate: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of ``gate`` and ``lora_b``: both follow from that of ``s c_i b_i``."""
    if not (needs_gate or needs_b):
        return None, None
    gate, lora_b, kept, scale = saved.gate, saved.lora_b, settings.kept, settings.scale
    grad_small = (saved.hidden @ grad).to(lora_b.dtype)  # (k, out)
    grad_gate = grad_b = None
    if needs_gate:
        grad_gate = (grad_small * _kept(lora_b, 1, kept).T).sum(1) * scale
        grad_gate = _spread(grad_gate.to(gate.dtype), 0, kept, gate.shape)
    if needs_b:
        grad_b = _spread(grad_small.T * (_kept(gate, 0, kept) * scale), 1, kept, lora_b.shape)
    return grad_gate, grad_b


def _rows(tensor: Tensor) -> Tensor:
    """Shape ``(tokens, features)``."""
    return tensor.reshape(-1, tensor.shape[-1])


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _component_dtype(x: Tensor, lora_a: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora_a.dtype


def _kept(tensor: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else tensor.index_select(dim, kept)


def _spread(grad: Tensor, dim: int, kept: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The gradient of all components from that of those kept."""
    return grad if kept is None else grad.new_zeros(shape).index_copy_(dim, kept, grad)


def _small_matrices(layer: LinearTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`SavedForBackward`."""
    kept = layer.settings.kept
    columns = _kept(layer.lora_b, 1, kept) * (_kept(layer.gate, 0, kept) * layer.settings.scale)
    return _kept(layer.lora_a, 0, kept).to(dtype), columns.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without a temporary where the dtypes are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
