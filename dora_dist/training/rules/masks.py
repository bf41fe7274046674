"""A mask given to a layer, with what depends on it."""

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.engine import scale_entries


@torch.no_grad()
def set_mask(layer: DynamicLoraLinear, mask: Tensor) -> None:
    """Leave components out for good, or take them in. A scale that depends on how many there are follows, and what it
    gains or loses goes into ``lora_b`` and its master copy: what stays computes what it did.

    Args:
        layer: any.
        mask: boolean, shape ``(r,)``, on any device; False where a component contributes nothing.
    """
    layer.component_mask.copy_(mask)
    factor = layer.follow_mask()
    if factor != 1:
        scale_entries(layer.lora_b, factor)
