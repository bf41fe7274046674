"""Replaces a layer's components by the singular vectors of its update, which leaves the function unchanged.

Singular components pruned by norm leave the best approximation of the update with that many components (Eckart and
Young, 1936). Components as trained do not: they overlap and oppose each other.
"""

import torch
from torch import Tensor

from dora_dist.method.importance import LayerParameters
from dora_dist.method.subspaces import fixed_signs


@torch.no_grad()
def singular_components(lora_a: Tensor, gate: Tensor, lora_b: Tensor) -> LayerParameters:
    """Components ``sigma_i u_i v_i`` with the same sum, the largest first.

    Every ``a_i`` has the root mean square length of the given ones, because the learning rate fits that scale. ``b_i``
    has the rest of the norm, and all gates are 1. Where the update has a lower rank, the surplus components can grow,
    as at LoRA's start: ``b_i`` is 0 and ``a_i`` is another direction. The largest entry of ``a_i`` fixes the
    sign.

    Args:
        lora_a: rows ``a_i``, shape ``(r, in)``.
        gate: gates ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.

    Returns:
        The same shapes, in float64.

    Raises:
        ValueError: there are more components than inputs or outputs, and therefore too few singular vectors.
    """
    rank, (inputs, outputs) = len(gate), (lora_a.shape[1], lora_b.shape[0])
    if rank > min(inputs, outputs):
        raise ValueError(
            f"cannot turn {rank} components of a layer with {inputs} inputs and {outputs} outputs into singular "
            "vectors, because there are fewer of these: lower adapter.initial_rank, or set pruning.rebase to false"
        )
    rows, row_mix = torch.linalg.qr(lora_a.double().T)
    columns, column_mix = torch.linalg.qr(lora_b.double() * gate.double())
    left, sigma, right = torch.linalg.svd(column_mix @ row_mix.T)
    directions = right @ rows.T
    signs = fixed_signs(directions)
    length = lora_a.double().square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    new_a = directions * signs * length
    new_b = (columns @ left) * (signs.squeeze(1) * sigma / length)
    return new_a, torch.ones_like(gate, dtype=torch.float64), new_b
