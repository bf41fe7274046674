"""The Dimensional Equilibrium Modulator (equation 10 of Mao et al., 2024)."""

from collections.abc import Iterable

import torch
from torch import Tensor


def equilibrium_penalty(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over layers and components of ``(Var(a_i) + Var(b_i)) / 2``, the variance unbiased over the entries.

    It discourages components that live in a few entries, for which the Frobenius norm would overstate their
    importance. A function of the weights alone: gradient accumulation, world size and token counts do not enter.

    Args:
        pairs: one ``(lora_a (r, in), lora_b (out, r))`` per layer, any floating dtype; computed in at least float32.

    Returns:
        Scalar tensor with gradients to every input.

    Raises:
        ValueError: there are no pairs, or a vector has fewer than two entries and therefore no variance.
    """
    total: Tensor | None = None
    count = 0
    for lora_a, lora_b in pairs:
        if lora_a.shape[1] < 2 or lora_b.shape[0] < 2:
            raise ValueError(f"the variance needs two entries; got {tuple(lora_a.shape)}, {tuple(lora_b.shape)}")
        layer = _at_least_float32(lora_a).var(dim=1).sum() + _at_least_float32(lora_b).var(dim=0).sum()
        total = layer if total is None else total + layer
        count += lora_a.shape[0]
    if total is None:
        raise ValueError("there are no layers to regularize")
    return total / (2 * count)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
