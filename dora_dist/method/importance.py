"""Importance of rank-one components, from weights alone (Mao et al., ACL 2024, equations 7 and 8), and what it is
compared with.

Pure functions on tensors: nothing here knows a model, a rank or a file. Another criterion is another
function with the signature of :func:`score_layers`, and a name in :data:`WEIGHT_CRITERIA`.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

Components = tuple[Tensor, Tensor, Tensor]
"""Of one layer: ``lora_a (r, in), gate (r,), lora_b (out, r)``."""
ScoreFunction = Callable[[Sequence[Components]], Tensor]
"""Layers with the same number of components ``r`` -> scores ``(layers, r)``, higher is more important."""
SHORTEST_BLOCK, LONGEST_BLOCK = 64, 512
"""Entries of a vector that are multiplied at a time."""
COPIED_AT_ONCE = 2**19
"""Elements in float64: 4 MiB."""


@torch.no_grad()
def component_scores(lora_a: Tensor, gate: Tensor, lora_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Share of each component in the Frobenius norm of its layer's update (equation 7).

    ``s_i = ||c_i b_i a_i||_F / (||sum_j c_j b_j a_j||_F + eps)``, without building any matrix of the
    layer's size: a rank-one norm is ``|c_i| ||a_i|| ||b_i||``, and the squared norm of the sum is
    ``c' [(A A') o (B' B)] c``. Opposing components cancel in that sum, so that it is accumulated in
    float64 whatever the inputs' dtype, and clamped at 0. Cost O(r^2 (in + out)).

    Args:
        lora_a: rows ``a_i``, shape ``(r, in)``, any floating dtype.
        gate: ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.
        eps: keeps a layer whose update is zero at score 0.

    Returns:
        Scores of shape ``(r,)`` on the inputs' device, in their dtype but at least float32. Non-finite inputs give
        non-finite scores.

    Raises:
        ValueError: the three shapes do not belong together, or a tensor is not floating point.
    """
    return score_layers([(lora_a, gate, lora_b)], eps)[0]


@torch.no_grad()
def score_layers(layers: Sequence[Components], eps: float = 1e-8) -> Tensor:
    """:func:`component_scores` of many layers with the same number of components, in fewer operations.

    The Gram products of a few layers are made at a time, as all ``A`` and ``B`` together are too large to be copied
    every step; all that follows is done for all layers at once.

    Returns:
        Scores of shape ``(layers, r)`` in the widest of the inputs' dtypes, but at least float32.

    Raises:
        ValueError: as for :func:`component_scores`, there are no layers, or their numbers of components differ.
    """
    _check_layers(layers)
    gram = _grams([lora_a for lora_a, _, _ in layers]) * _grams([lora_b.T for _, _, lora_b in layers])
    gates = torch.stack([gate for _, gate, _ in layers]).double()
    norms = gates.abs() * gram.diagonal(dim1=1, dim2=2).sqrt()
    squares = (gram * gates.unsqueeze(1) * gates.unsqueeze(2)).flatten(1).sum(1, keepdim=True)
    scores: Tensor = norms / (squares.clamp(min=0).sqrt() + eps)
    dtypes = {tensor.dtype for layer in layers for tensor in layer}
    return scores.to(functools.reduce(torch.promote_types, dtypes, torch.float32))


@torch.no_grad()
def component_magnitudes(layers: Sequence[Components]) -> Tensor:
    """Frobenius norm of each component, ``|c_i| ||a_i|| ||b_i||``: equation 7 without the layer's own norm below it.

    A component of a layer whose update is small counts for little here; its share in that layer does not show it.

    Returns:
        Scores of shape ``(layers, r)``, float64.

    Raises:
        ValueError: as for :func:`score_layers`.
    """
    _check_layers(layers)
    norms = [
        gate.double().abs()
        * vector_norm(lora_a, dim=1, dtype=torch.float64)
        * vector_norm(lora_b, dim=0, dtype=torch.float64)
        for lora_a, gate, lora_b in layers
    ]
    return torch.stack(norms)


def squared_magnitudes(layers: Sequence[Components]) -> Tensor:
    """Squares of :func:`component_magnitudes`: what removing a component takes from the update's squared norm, where
    components are orthogonal. Shape ``(layers, r)``, float64."""
    return component_magnitudes(layers).square()


def random_scores(seed: int) -> ScoreFunction:
    """A criterion that knows nothing, to compare others with: scores in [0, 1) that depend on ``seed`` and the place of
    a component, and stay the same for the whole run."""

    def score(layers: Sequence[Components]) -> Tensor:
        _check_layers(layers)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(layers), len(layers[0][1]), generator=generator, dtype=torch.float64)
        return drawn.to(layers[0][1].device)

    return score


def weight_criterion(name: str, seed: int) -> ScoreFunction:
    """The criterion of a name.

    Args:
        name: one of :data:`WEIGHT_CRITERIA`.
        seed: for the random one.

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
"""Criteria that look at weights alone, given a seed: the paper's, its numerator, the square of that, and chance."""


def _grams(matrices: Sequence[Tensor]) -> Tensor:
    """Products of all pairs of rows of each matrix, shape ``(matrices, r, r)``, float64.

    Rows are cut into blocks, and a few matrices of one shape copied into float64 at a time: few operations for small
    matrices, and for large ones copies that stay in the cache and blocks for all cores. A product of each whole matrix
    takes twice the time.

    Args:
        matrices: shape ``(r, n)`` each, n of their own, contiguous or the transpose of a contiguous one.
    """
    rank = matrices[0].shape[0]
    grams = torch.empty(len(matrices), rank, rank, dtype=torch.float64, device=matrices[0].device)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    # One copy's memory for all: asked for anew, it would cost as much time as the products.
    scratch = grams.new_empty(max(COPIED_AT_ONCE, max(matrix.numel() for matrix in matrices)))
    for (_, length), indices in by_shape.items():
        size = _block_size(length)
        per_matrix = length // size
        at_once = max(1, COPIED_AT_ONCE // (rank * length))
        for start in range(0, len(indices), at_once):
            chosen = indices[start : start + at_once]
            blocks = scratch[: len(chosen) * rank * length].view(-1, size, rank).mT
            if matrices[chosen[0]].stride(1) == 1:  # rows of A; the columns of B are copied as they lie, too
                blocks = blocks.mT.view(-1, rank, size)
            for place, index in enumerate(chosen):
                rows = matrices[index].view(rank, per_matrix, size)
                blocks[place * per_matrix : (place + 1) * per_matrix].copy_(rows.transpose(0, 1))
            products = torch.bmm(blocks, blocks.mT)
            grams[chosen] = products.view(len(chosen), per_matrix, rank, rank).sum(1)
    return grams


def _block_size(length: int) -> int:
    """The largest divisor that is no longer than a block; the length itself where that would be tiny."""
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


def _check_layers(layers: Sequence[Components]) -> None:
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
