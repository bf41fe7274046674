"""Frozen linear maps that read one input, and their rank-one components, as one differentiable operation.

``y = W0 x + s * sum_i c_i b_i (a_i . x)`` (equation 6 of Mao et al., 2024), written so that an adapter costs little
more than its products: the components are added to the base's output in place, the backward adds to the base's input
gradient in place, and layers that read the same tensor (q, k and v; gate and up) read it once. Why each of these, and
what did not help: ``docs/performance.md``. Gate, scale and mask are in the columns already
(:mod:`dora_dist.adapter.components`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.adapter.components import Operands
from dora_dist.base_model.quantization import dequantized_weight, product_dtype


class Frozen(NamedTuple):
    """Base layers and dropout of layers that read one tensor."""

    bases: tuple[nn.Linear, ...]
    """Frozen linear layers that :func:`dora_dist.base_model.quantization.dequantized_weight` knows."""
    dropout: float = 0.0
    """Probability that an entry of the components' input is dropped (the base's input never is). All layers drop the
    same entries."""


class SavedForBackward(NamedTuple):
    """What the forward of layers saves for their backward, besides the input."""

    rows: Tensor
    """``a_i`` of all layers, shape ``(components, in)``."""
    hidden: Tensor
    """``a_i . x`` of all layers, shape ``(components, tokens)``: contiguous along the long side, with which CPU
    kernels take half the time."""
    mask: Tensor | None
    """Mask of dropout, shape ``(tokens, in)``, one byte per entry; None without dropout."""
    columns: tuple[Tensor, ...]
    """``s c_i b_i`` of each layer, shape ``(r, out)``."""

    def flat(self) -> list[Tensor | None]:
        """The tensors as a flat list, which :func:`unpack` reads."""
        return [self.rows, self.hidden, self.mask, *self.columns]

    def hidden_of_layers(self) -> tuple[Tensor, ...]:
        """:attr:`hidden` of each layer."""
        sizes = [len(columns) for columns in self.columns]
        parts: tuple[Tensor, ...] = self.hidden.split(sizes)
        return parts


class Gradients(NamedTuple):
    """Gradients of :func:`adapted_linears`; None where none is needed."""

    x: Tensor | None
    rows: Tensor | None
    columns: list[Tensor | None]


def adapted_linears(x: Tensor, operands: Operands, frozen: Frozen) -> tuple[Tensor, ...]:
    """Base layer plus components of every layer, differentiable once with respect to ``x`` and the components.

    Args:
        x: the input, shape ``(..., in)``.
        operands: operands of the layers; components are computed in their dtype.
        frozen: base layers and dropout of these layers.

    Returns:
        The output of each layer, shape ``(..., out)``, in its base layer's output dtype.
    """
    # torch has no types for `apply`.
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(  # type: ignore[no-untyped-call]
        x, frozen, operands.rows, *operands.columns
    )
    return outputs


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, rows: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        outputs, saved = forward(x, Operands(rows, columns), frozen)
        ctx.frozen = frozen
        ctx.save_for_backward(x, *saved.flat())
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        found = backward(grad_outputs, x, unpack(tensors), ctx.frozen, needs_x, needs)
        return found.x, None, found.rows, *found.columns


def unpack(tensors: Sequence[Any]) -> SavedForBackward:
    """The inverse of :meth:`SavedForBackward.flat`."""
    rows, hidden, mask, *columns = tensors
    return SavedForBackward(rows, hidden, mask, tuple(columns))


def forward(x: Tensor, operands: Operands, frozen: Frozen) -> tuple[list[Tensor], SavedForBackward]:
    """Outputs of :func:`adapted_linears`, and what :func:`backward` needs; without autograd."""
    saved = read_input(x, operands, frozen.dropout)
    parts = zip(frozen.bases, saved.hidden_of_layers(), saved.columns, strict=True)
    return [output_of(x, base, hidden, columns) for base, hidden, columns in parts], saved


def read_input(x: Tensor, operands: Operands, dropout: float) -> SavedForBackward:
    """Compute ``a_i . x``: everything that the backward needs, but no output yet."""
    inputs, mask = _tokens(x).to(operands.rows.dtype), None
    if dropout:
        inputs, mask = torch.native_dropout(inputs, dropout, True)
    return SavedForBackward(operands.rows, operands.rows @ inputs.T, mask, operands.columns)


def output_of(x: Tensor, base: nn.Linear, hidden: Tensor, columns: Tensor) -> Tensor:
    """Base layer plus components, shape ``(..., out)``."""
    output: Tensor = base(x)
    _add_product(output.view(-1, output.shape[-1]), hidden.T, columns)
    return output


def backward(
    grad_outputs: Sequence[Tensor],
    x: Tensor,
    saved: SavedForBackward,
    frozen: Frozen,
    needs_x: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of :func:`adapted_linears`.

    Args:
        grad_outputs: gradient of every output, shape ``(..., out)``.
        x: the input of the forward, shape ``(..., in)``.
        saved: what :func:`forward` has saved.
        frozen: the same as in the forward.
        needs_x: whether ``x`` needs a gradient.
        needs: whether the rows need one, and then the same for the columns of each layer.
    """
    grad_x = _base_gradient(grad_outputs, frozen.bases) if needs_x else None
    needs_rows, *needs_columns = needs
    grad_hidden = torch.empty_like(saved.hidden)
    grad_columns: list[Tensor | None] = [None] * len(grad_outputs)
    parts = zip(grad_outputs, grad_hidden.split([len(one) for one in saved.columns]), saved.columns, strict=True)
    hidden = saved.hidden_of_layers()
    for at, (grad_output, part, columns) in enumerate(parts):
        grad = _tokens(grad_output).to(part.dtype)
        torch.mm(columns, grad.T, out=part)
        if needs_columns[at]:
            grad_columns[at] = hidden[at] @ grad
    if saved.mask is not None:
        grad_hidden /= 1 - frozen.dropout  # dropout divides what it keeps by this
    if grad_x is not None:
        if saved.mask is None:
            _add_product(grad_x, grad_hidden.T, saved.rows)
        else:
            grad_x.add_((grad_hidden.T @ saved.rows).mul_(saved.mask))
    grad_rows = None
    if needs_rows:
        inputs = _tokens(x).to(saved.rows.dtype)
        grad_rows = grad_hidden @ (inputs if saved.mask is None else inputs * saved.mask)
    return Gradients(None if grad_x is None else grad_x.to(x.dtype).view(x.shape), grad_rows, grad_columns)


def _base_gradient(grad_outputs: Sequence[Tensor], bases: Sequence[nn.Linear]) -> Tensor:
    """Sum of ``grad_output @ W0`` over the layers, shape ``(tokens, in)``."""
    dtype = product_dtype(bases[0], grad_outputs[0])
    total = _tokens(grad_outputs[0]).to(dtype) @ dequantized_weight(bases[0], dtype)
    for grad_output, base in zip(grad_outputs[1:], bases[1:], strict=True):
        # One dequantized weight at a time: none has a name.
        total.addmm_(_tokens(grad_output).to(dtype), dequantized_weight(base, dtype))
    return total


def _tokens(tensor: Tensor) -> Tensor:
    """The tensor in shape ``(tokens, features)``."""
    return tensor.reshape(-1, tensor.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without a temporary where the dtypes are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
