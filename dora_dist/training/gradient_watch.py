"""Whether the loss depends on every adapted layer, seen in the backwards of the first step."""

import re
from collections.abc import Mapping
from functools import partial

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.console.errors import mark_common
from dora_dist.distributed.agreement import Agreement

EXPERT = r"\bexperts\.\d+\."
"""In the name of a layer of an expert of its own, which is not reached where no token is sent to it."""
MOST_NAMED = 3


class GradientWatch:
    """Watches layers until :meth:`check`. One that the loss does not depend on would count in the budget for nothing.

    Gradients of parameters do not tell: the regularizer gives one to every component, and ZeRO takes them away. So a
    layer reports when the backward comes to it.

    Args:
        layers: by name, the same on every rank.
    """

    def __init__(self, layers: Mapping[str, DynamicLoraLinear]) -> None:
        self._layers = layers
        self._reached: set[str] = set()
        for name, layer in layers.items():
            layer.on_gradient = partial(self._reached.add, name)

    def check(self, agreement: Agreement) -> None:
        """End the watch; to be called on every rank, after the first step.

        Raises:
            ValueError: no gradient has come to a layer, on any rank; on all ranks.
        """
        for layer in self._layers.values():
            layer.on_gradient = None
        reached = set().union(*agreement.gather(self._reached))
        missing = [name for name in self._layers if name not in reached and not re.search(EXPERT, name)]
        if missing:
            named = ", ".join(missing[:MOST_NAMED]) + (", ..." if len(missing) > MOST_NAMED else "")
            raise mark_common(
                ValueError(
                    f"no gradient has come to {len(missing)} of {len(self._layers)} adapted layers in the first step "
                    f"({named}), so that the loss does not depend on them: leave them out of adapter.target_modules"
                )
            )
