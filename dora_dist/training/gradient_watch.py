"""Checks that the loss depends on every adapted layer, by watching the backward passes of the first step."""

import re
from collections.abc import Mapping
from functools import partial

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.console.errors import mark_common
from dora_dist.distributed.agreement import Agreement

EXPERT = r"\bexperts\.\d+\."
"""Part of the name of a layer that belongs to one expert; no gradient reaches it if no token is routed to the
expert."""
MOST_NAMED = 3


class GradientWatch:
    """Watches layers until :meth:`check`. A layer that the loss does not depend on would waste its share of the budget.

    The gradients of parameters cannot show this: the regularizer gives one to every component, and ZeRO removes them.
    Each layer therefore reports when the backward pass reaches it.

    Args:
        layers: adapted layers by name, the same on every rank.
    """

    def __init__(self, layers: Mapping[str, DynamicLoraLinear]) -> None:
        self._layers = layers
        self._reached: set[str] = set()
        for name, layer in layers.items():
            layer.on_gradient = partial(self._reached.add, name)

    def check(self, agreement: Agreement) -> None:
        """End the watch; must be called on every rank, after the first step.

        Raises:
            ValueError: no gradient has reached a layer on any rank; raised on all ranks.
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
                    f"({named}), so the loss does not depend on them: leave them out of adapter.target_modules"
                )
            )
