"""Sets the component mask of a layer, and updates what depends on it."""

import torch
from torch import Tensor

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.engine import scale_entries


@torch.no_grad()
def set_mask(layer: DynamicLoraLinear, mask: Tensor) -> None:
    """Mask components out or in. If the layer's scale depends on their number, the scale changes, and ``lora_b`` and
    its master copy are multiplied by the inverse factor: the remaining components compute what they did before.

    Args:
        layer: any adapted layer.
        mask: boolean, shape ``(r,)``, on any device; False for components that contribute nothing.
    """
    layer.component_mask.copy_(mask)
    factor = layer.follow_mask()
    if factor != 1:
        scale_entries(layer.lora_b, factor)
