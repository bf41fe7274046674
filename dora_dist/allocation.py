"""Which components stay: one selection over all layers of the model (Algorithm 1 of Mao et al., 2024).

Pure functions on tensors. Another selection rule is another function with the signature of
:func:`select_components`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def select_components(
    scores: Mapping[str, Tensor], num_keep: int, min_rank: int = 0, max_rank: int | None = None
) -> dict[str, Tensor]:
    """Keep exactly the ``num_keep`` components with the highest scores of the whole model.

    All components of all layers compete. Ties are broken by a fixed total order (score, then layer name, then
    index within the layer), so that the result depends neither on the order of the mapping nor on a device. Under
    the bounds the kept sum of scores is the largest possible: the reserved components are the best of their
    layers, and the rest is filled greedily from the best that the upper bound admits.

    Args:
        scores: layer name -> scores, shape ``(r,)``, any floating dtype; compared in float64 on the CPU.
        num_keep: components to keep over all layers.
        min_rank: components that every layer keeps at least.
        max_rank: components that any layer keeps at most; ``None`` for no bound.

    Returns:
        Layer name -> boolean mask of shape ``(r,)`` on the CPU, True where the component is kept.

    Raises:
        ValueError: a score is not finite, or no selection fits the numbers.
    """
    names = sorted(scores)
    sizes = {name: scores[name].numel() for name in names}
    _check_feasible(sizes, num_keep, min_rank, max_rank)
    for name in names:
        if not torch.isfinite(scores[name]).all():
            raise ValueError(f"layer {name} has a non-finite score: {scores[name].tolist()}")
    flat = torch.cat([scores[name].detach().double().cpu() for name in names])
    place = torch.cat([_places_in_layer(scores[name]) for name in names])
    reserved = place < min_rank
    admitted = place < (max_rank if max_rank is not None else max(sizes.values()))
    # A stable descending sort on (reserved first, then admitted, then the rest) x score keeps the fixed order of ties.
    by_score = torch.sort(flat, descending=True, stable=True).indices
    tier = reserved.int() + admitted.int()
    order = by_score[torch.sort(tier[by_score], descending=True, stable=True).indices]
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[order[:num_keep]] = True
    return dict(zip(names, torch.split(keep, [sizes[name] for name in names]), strict=True))


def _places_in_layer(scores: Tensor) -> Tensor:
    """Place of each component among those of its layer, 0 for the best; ties by index. Shape ``(r,)``, int64."""
    order = torch.sort(scores.detach().double().cpu(), descending=True, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    return places


def _check_feasible(sizes: Mapping[str, int], num_keep: int, min_rank: int, max_rank: int | None) -> None:
    if not sizes:
        raise ValueError("there are no layers to select components from")
    if min_rank < 0 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"need 0 <= min_rank <= max_rank, got min_rank {min_rank} and max_rank {max_rank}")
    smallest = min(sizes.values())
    if min_rank > smallest:
        raise ValueError(f"min_rank is {min_rank}, but the smallest layer has {smallest} components")
    least = min_rank * len(sizes)
    most = sum(size if max_rank is None else min(size, max_rank) for size in sizes.values())
    if not least <= num_keep <= most:
        raise ValueError(
            f"cannot keep {num_keep} of {sum(sizes.values())} components: {len(sizes)} layers with min_rank {min_rank} "
            f"and max_rank {max_rank} admit {least} to {most}; change target_rank, min_rank or max_rank"
        )
