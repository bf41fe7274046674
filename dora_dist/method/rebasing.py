"""The components of a layer turned into the singular vectors of its update: the same function, other components.

Pruned by their norms, singular components leave the best approximation of the update that so many components can give
(Eckart and Young, 1936); components as training has left them overlap and oppose each other, and do not.
"""

import torch
from torch import Tensor

from dora_dist.method.importance import Components
from dora_dist.method.subspaces import fixed_signs


@torch.no_grad()
def singular_components(lora_a: Tensor, gate: Tensor, lora_b: Tensor) -> Components:
    """Components ``sigma_i u_i v_i`` with the same sum, the largest first.

    Every ``a_i`` has the root mean square length of those given, which is the scale that the learning rate is right
    for; ``b_i`` has the rest of the norm, and gates are 1. Where the update has a lower rank, ``b_i`` is 0 and ``a_i``
    a direction of its own, as LoRA starts: such a component can grow. Signs are fixed by the largest entry of ``a_i``.

    Args:
        lora_a: rows ``a_i``, shape ``(r, in)``.
        gate: ``c_i``, shape ``(r,)``.
        lora_b: columns ``b_i``, shape ``(out, r)``.

    Returns:
        The same shapes, in float64.

    Raises:
        ValueError: there are more components than inputs or outputs, and so than singular vectors.
    """
    rank, (inputs, outputs) = len(gate), (lora_a.shape[1], lora_b.shape[0])
    if rank > min(inputs, outputs):
        raise ValueError(
            f"cannot turn {rank} components of a layer with {inputs} inputs and {outputs} outputs into singular "
            "vectors, of which there are fewer: lower adapter.initial_rank, or set pruning.rebase to false"
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
