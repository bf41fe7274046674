"""Tensors of one shape side by side, so that one operation computes with all of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def stacked(tensors: Sequence[Tensor], most: int | None = None) -> Iterator[tuple[Tensor, list[int]]]:
    """Tensors of one shape in one of one more dimension, and their places in the sequence, until all have been there.

    Args:
        tensors: of any shapes. Those that come out are copies, differentiable in these.
        most: elements that are copied at a time; by default all that have one shape.
    """
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    for shape, alike in places.items():
        at_once = len(alike) if most is None else max(1, most // shape.numel())
        for start in range(0, len(alike), at_once):
            chosen = alike[start : start + at_once]
            yield torch.stack([tensors[place] for place in chosen]), chosen


def in_order(parts: Sequence[tuple[Tensor, list[int]]]) -> Tensor:
    """What has been computed from each tensor of :func:`stacked`, in the order of the sequence, in one tensor."""
    found: dict[int, Tensor] = {}
    for stack, places in parts:
        found |= zip(places, stack.unbind(), strict=True)
    return torch.stack([found[place] for place in range(len(found))])
