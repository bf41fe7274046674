"""Stacks tensors of one shape, which lets one operation compute with all of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def stacked(tensors: Sequence[Tensor], most: int | None = None) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield stacks of tensors of one shape, each with the tensors' positions in the sequence, until all are yielded.

    Args:
        tensors: tensors of any shapes. The stacks are copies, differentiable with respect to these.
        most: largest number of elements to copy at a time, but at least one tensor; by default all of one shape.
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
    """Results computed from the stacks of :func:`stacked`, as one tensor in the order of the original sequence."""
    found: dict[int, Tensor] = {}
    for stack, places in parts:
        found |= zip(places, stack.unbind(), strict=True)
    return torch.stack([found[place] for place in range(len(found))])
