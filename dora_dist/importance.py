"""Importance of rank-one components, from weights alone (Mao et al., ACL 2024, equations 7 and 8).

Pure functions on tensors: nothing here knows a model, a rank or a file. Another criterion is another
function with the signature of :func:`score_layers`; the controller takes it as an argument.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Components = tuple[Tensor, Tensor, Tensor]
"""Of one layer: ``lora_a (r, in), gate (r,), lora_b (out, r)``."""
ScoreFunction = Callable[[Sequence[Components]], Tensor]
"""Layers with the same number of components ``r`` -> scores ``(layers, r)``, higher is more important."""


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

    Only the two Gram products are made layer by layer, since ``A`` and ``B`` are too large to be stacked every step;
    all that follows is done for all layers at once.

    Returns:
        Scores of shape ``(layers, r)`` in the widest of the inputs' dtypes, but at least float32.

    Raises:
        ValueError: as for :func:`component_scores`, there are no layers, or their numbers of components differ.
    """
    if not layers:
        raise ValueError("there are no layers to score")
    for layer in layers:
        _check_shapes(*layer)
    rank, device = len(layers[0][1]), layers[0][1].device
    if any(len(gate) != rank for _, gate, _ in layers):
        raise ValueError(f"layers differ in their number of components: {[len(gate) for _, gate, _ in layers]}")
    gram_a, gram_b = torch.empty(2, len(layers), rank, rank, dtype=torch.float64, device=device)
    for index, (lora_a, _, lora_b) in enumerate(layers):
        a, b = lora_a.double(), lora_b.double()
        torch.mm(a, a.T, out=gram_a[index])
        torch.mm(b.T, b, out=gram_b[index])
    gates = torch.stack([gate for _, gate, _ in layers]).double()
    gram = gram_a.mul_(gram_b)
    norms = gates.abs() * gram.diagonal(dim1=1, dim2=2).sqrt()
    squares = (gram * gates.unsqueeze(1) * gates.unsqueeze(2)).flatten(1).sum(1, keepdim=True)
    scores: Tensor = norms / (squares.clamp(min=0).sqrt() + eps)
    dtypes = {tensor.dtype for layer in layers for tensor in layer}
    return scores.to(functools.reduce(torch.promote_types, dtypes, torch.float32))


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


def _check_shapes(lora_a: Tensor, gate: Tensor, lora_b: Tensor) -> None:
    shapes = f"lora_a {tuple(lora_a.shape)}, gate {tuple(gate.shape)}, lora_b {tuple(lora_b.shape)}"
    if lora_a.ndim != 2 or gate.ndim != 1 or lora_b.ndim != 2:
        raise ValueError(f"expected lora_a (r, in), gate (r,), lora_b (out, r); got {shapes}")
    if not lora_a.shape[0] == gate.shape[0] == lora_b.shape[1]:
        raise ValueError(f"the number of components r differs between the three tensors: {shapes}")
    if not (lora_a.is_floating_point() and gate.is_floating_point() and lora_b.is_floating_point()):
        raise ValueError(f"expected floating point tensors, got {lora_a.dtype}, {gate.dtype}, {lora_b.dtype}")
