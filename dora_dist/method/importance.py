"""Importance scores of rank-one components, computed from weights alone (Mao et al., ACL 2024, equations 7 and 8), and
the scores that they are compared with.

Pure functions on tensors: no model, process or file. To add a criterion, write a function with the signature of
:func:`score_layers` and add its name to :data:`WEIGHT_CRITERIA`.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from dora_dist.method.stacking import in_order, stacked

LayerParameters = tuple[Tensor, Tensor, Tensor]
"""The tensors of one layer: ``lora_a (r, in), gate (r,), lora_b (out, r)``."""
ScoreFunction = Callable[[Sequence[LayerParameters]], Tensor]
"""Maps layers with the same number of components ``r`` to scores ``(layers, r)``; higher is more important."""
SHORTEST_BLOCK, LONGEST_BLOCK = 64, 512
"""Number of a vector's entries that are multiplied at a time."""
COPIED_AT_ONCE = 2**19
"""Most float64 elements that are copied at a time on a CPU: 4 MiB."""
COPIED_AT_ONCE_ON_GPU = 2**24
"""The same on a GPU, 128 MiB: enough for the adapter of an 8B model in a few pieces."""


@torch.no_grad()
def component_scores(lora_a: Tensor, gate: Tensor, lora_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Share of each component in the Frobenius norm of its layer's update (equation 7).

    ``s_i = ||c_i b_i a_i||_F / (||sum_j c_j b_j a_j||_F + eps)``. No matrix of the layer's size is built: a rank-one
    norm is ``|c_i| ||a_i|| ||b_i||``, and the squared norm of the sum is ``c' [(A A') o (B' B)] c``. Opposing
    components cancel in that sum, so it is accumulated in float64 whatever the inputs' dtype, and clamped at 0. Cost
    O(r^2 (in + out)).

    Args:
        lora_a: rows ``a_i``, shape ``(r, in)``, any floating dtype.
        gate: gates ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.
        eps: term of the denominator that gives components of a layer whose update is zero the score 0.

    Returns:
        Scores of shape ``(r,)`` on the inputs' device, in their dtype but at least float32. Non-finite inputs give
        non-finite scores.

    Raises:
        ValueError: the three shapes do not match, or a tensor is not floating point.
    """
    return score_layers([(lora_a, gate, lora_b)], eps)[0]


@torch.no_grad()
def score_layers(layers: Sequence[LayerParameters], eps: float = 1e-8) -> Tensor:
    """:func:`component_scores` for many layers with the same number of components, in fewer operations.

    Gram products are computed for layers of one shape together. This is done in pieces, because all ``A`` and ``B`` in
    float64 would take much memory. All further steps handle all layers at once.

    Returns:
        Scores of shape ``(layers, r)`` in the widest of the inputs' dtypes, but at least float32.

    Raises:
        ValueError: as in :func:`component_scores`, or there are no layers, or their numbers of components differ.
    """
    _check_layers(layers)
    gram = _grams([lora_a for lora_a, _, _ in layers], 1) * _grams([lora_b for _, _, lora_b in layers], 0)
    gates = torch.stack([gate for _, gate, _ in layers]).double()
    norms = gates.abs() * gram.diagonal(dim1=1, dim2=2).sqrt()
    squares = (gram @ gates.unsqueeze(2)).squeeze(2).mul_(gates).sum(1, keepdim=True)
    scores: Tensor = norms / (squares.clamp_(min=0).sqrt_() + eps)
    dtypes = {tensor.dtype for layer in layers for tensor in layer}
    return scores.to(functools.reduce(torch.promote_types, dtypes, torch.float32))


@torch.no_grad()
def component_magnitudes(layers: Sequence[LayerParameters]) -> Tensor:
    """Frobenius norm of each component, ``|c_i| ||a_i|| ||b_i||``: the numerator of equation 7.

    A component of a layer with a small update therefore gets a low score, even if it dominates that layer.

    Returns:
        Scores of shape ``(layers, r)``, float64.

    Raises:
        ValueError: as in :func:`score_layers`.
    """
    _check_layers(layers)
    gates = torch.stack([gate for _, gate, _ in layers]).double()
    return gates.abs() * _lengths([lora_a for lora_a, _, _ in layers], 1) * _lengths([b for _, _, b in layers], 0)


def squared_magnitudes(layers: Sequence[LayerParameters]) -> Tensor:
    """Squares of :func:`component_magnitudes`. Where components are orthogonal, this is how much the update's squared
    norm falls when the component is removed. Shape ``(layers, r)``, float64."""
    return component_magnitudes(layers).square()


def random_scores(seed: int) -> ScoreFunction:
    """A random criterion as a baseline for the others. Its scores are in [0, 1), depend on ``seed`` and the component's
    position only, and stay the same for the whole run."""

    def score(layers: Sequence[LayerParameters]) -> Tensor:
        _check_layers(layers)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(layers), len(layers[0][1]), generator=generator, dtype=torch.float64)
        return drawn.to(layers[0][1].device)

    return score


def weight_criterion(name: str, seed: int) -> ScoreFunction:
    """The criterion with this name.

    Args:
        name: one of :data:`WEIGHT_CRITERIA`.
        seed: seed of the random criterion.

    Raises:
        ValueError: there is no such criterion.
    """
    if name not in WEIGHT_CRITERIA:
        raise ValueError(f"importance is {name!r}, but must be one of {', '.join(WEIGHT_CRITERIA)}")
    return WEIGHT_CRITERIA[name](seed)


WEIGHT_CRITERIA: dict[str, Callable[[int], ScoreFunction]] = {
    "frobenius": lambda seed: score_layers,
    "magnitude": lambda seed: component_magnitudes,
    "squared_magnitude": lambda seed: squared_magnitudes,
    "random": random_scores,
}
"""Criteria that use weights alone, each made from a seed: the paper's, its numerator, the numerator squared, random."""


def _lengths(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Norms of each matrix' vectors, shape ``(matrices, r)``, float64; arguments as in :func:`_grams`."""
    return in_order(
        [(vector_norm(stack, dim=1 + dim, dtype=torch.float64), places) for stack, places in stacked(matrices)]
    )


def _grams(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Products of all pairs of each matrix' vectors, shape ``(matrices, r, r)``, float64.

    Matrices of one shape are multiplied together; on a CPU, only as many at a time as fit in its cache. Vectors are
    split into blocks to give work to all cores: a product of each whole matrix takes twice the time.

    Args:
        matrices: matrices of ``r`` vectors each; the lengths may differ between matrices.
        dim: dimension of a vector's entries: 1 if vectors are rows, 0 if they are columns.
    """
    device = matrices[0].device
    most = max(COPIED_AT_ONCE if device.type == "cpu" else COPIED_AT_ONCE_ON_GPU, *(m.numel() for m in matrices))
    # One buffer for all copies: a new allocation for each would cost as much time as the products.
    scratch = torch.empty(min(most, sum(m.numel() for m in matrices)), dtype=torch.float64, device=device)
    found = []
    for stack, places in stacked(matrices, most):
        layers, rank, length = len(places), stack.shape[2 - dim], stack.shape[1 + dim]
        size = _block_size(length)
        if dim == 1:
            blocks = stack.view(layers, rank, length // size, size).transpose(1, 2)
        else:
            blocks = stack.view(layers, length // size, size, rank)
        wide = scratch[: stack.numel()].view(blocks.shape).copy_(blocks).flatten(0, 1)
        products = torch.bmm(wide, wide.mT) if dim == 1 else torch.bmm(wide.mT, wide)
        found.append((products.view(layers, -1, rank, rank).sum(1), places))
    return in_order(found)


def _block_size(length: int) -> int:
    """The largest divisor of ``length`` that is at most a block; ``length`` itself where that divisor would be tiny."""
    size = next(size for size in range(min(length, LONGEST_BLOCK), 0, -1) if length % size == 0)
    return size if size >= SHORTEST_BLOCK else length


def smooth(previous: Tensor, current: Tensor, beta: float) -> Tensor:
    """Exponential moving average of scores, once per optimizer step (equation 8): ``beta S + (1 - beta) s``.

    Args:
        previous: smoothed scores so far, shape ``(r,)``; zeros before the first step.
        current: scores of this step, shape ``(r,)``.
        beta: weight of the past, in [0, 1).

    Raises:
        ValueError: ``beta`` is outside [0, 1) or the shapes differ.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"smoothing is {beta}, but must lie in [0, 1); 0 switches smoothing off")
    if previous.shape != current.shape:
        raise ValueError(f"cannot smooth scores of shape {tuple(current.shape)} into {tuple(previous.shape)}")
    return beta * previous + (1 - beta) * current


def _check_layers(layers: Sequence[LayerParameters]) -> None:
    if not layers:
        raise ValueError("there are no layers to score")
    for layer in layers:
        _check_shapes(*layer)
    rank = len(layers[0][1])
    if any(len(gate) != rank for _, gate, _ in layers):
        raise ValueError(f"layers differ in their number of components: {[len(gate) for _, gate, _ in layers]}")


def _check_shapes(lora_a: Tensor, gate: Tensor, lora_b: Tensor) -> None:
    shapes = f"lora_a {tuple(lora_a.shape)}, gate {tuple(gate.shape)}, lora_b {tuple(lora_b.shape)}"
    if lora_a.ndim != 2 or gate.ndim != 1 or lora_b.ndim != 2:
        raise ValueError(f"expected lora_a (r, in), gate (r,), lora_b (out, r); got {shapes}")
    if not lora_a.shape[0] == gate.shape[0] == lora_b.shape[1]:
        raise ValueError(f"the number of components r differs between the three tensors: {shapes}")
    if not (lora_a.is_floating_point() and gate.is_floating_point() and lora_b.is_floating_point()):
        raise ValueError(f"expected floating point tensors, got {lora_a.dtype}, {gate.dtype}, {lora_b.dtype}")
