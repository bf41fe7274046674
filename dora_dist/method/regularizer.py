"""The Dimensional Equilibrium Modulator (equation 10 of Mao et al., 2024)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_dist.method.stacking import stacked


def equilibrium_penalty(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over layers and components of ``(Var(a_i) + Var(b_i)) / 2``, with unbiased variances over the entries.

    It discourages components whose weight is in a few entries: the Frobenius norm would overstate their importance. It
    depends on the weights alone, not on gradient accumulation, world size or token counts.

    Args:
        pairs: one ``(lora_a (r, in), lora_b (out, r))`` per layer, any floating dtype; computed in at least float32.

    Returns:
        Scalar tensor, differentiable once with respect to every input.

    Raises:
        ValueError: there are no pairs, or a vector has fewer than two entries and therefore no variance.
    """
    layers = list(pairs)
    if not layers:
        raise ValueError("there are no layers to regularize")
    for lora_a, lora_b in layers:
        if lora_a.shape[1] < 2 or lora_b.shape[0] < 2:
            raise ValueError(f"the variance needs two entries; got {tuple(lora_a.shape)}, {tuple(lora_b.shape)}")
    rows = [stack.flatten(0, 1) for stack, _ in stacked([lora_a for lora_a, _ in layers])]
    return penalty_of_stacks(rows, [stack for stack, _ in stacked([lora_b for _, lora_b in layers])])


def penalty_of_stacks(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """:func:`equilibrium_penalty` for layers that are stacked by shape, in a few operations for each shape.

    Args:
        rows: one stack for each input width: all ``a_i`` of that width, shape ``(components, in)``.
        columns: one stack for each shape of ``lora_b``, shape ``(layers, out, r)``.
    """
    # torch has no types for `apply`.
    penalty: Tensor = _Penalty.apply(*rows, *columns)  # type: ignore[no-untyped-call]
    return penalty


class _Penalty(torch.autograd.Function):
    """The penalty with its gradient in closed form, ``(t - mean(t)) / (n - 1)`` divided by the number of components.
    In every stack, dimension 1 is the one of a vector's entries."""

    @staticmethod
    def forward(ctx: Any, *stacks: Tensor) -> Tensor:
        components = sum(len(stack) for stack in stacks if stack.ndim == 2)
        wide = (stack.to(torch.promote_types(stack.dtype, torch.float32)) for stack in stacks)
        variances, means = zip(*(torch.var_mean(stack, 1, keepdim=True) for stack in wide), strict=True)
        ctx.save_for_backward(*stacks, *means)
        ctx.components = components
        return torch.stack([variance.sum() for variance in variances]).sum() / (2 * components)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        tensors, gradients = ctx.saved_tensors, []
        half = len(tensors) // 2
        for stack, mean in zip(tensors[:half], tensors[half:], strict=True):
            factor = grad_output / ((stack.shape[1] - 1) * ctx.components)
            # The difference in the dtype of the mean.
            gradients.append((stack - mean).mul_(factor).to(stack.dtype))
        return tuple(gradients)
