"""Adapted layers that one module calls with the same tensor, one after another: the first call computes all of them.

Attention reads its input three times, for q, k and v. Computed together, their components read it once, and the three
parts of its gradient add up in place (:mod:`dora_dist.adapter.linear_operation`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear, frozen, operands
from dora_dist.adapter.linear_operation import adapted_linears
from dora_dist.base_model.shape import QUERY_KEY_VALUE
from dora_dist.console.text import say


def share_inputs(model: nn.Module) -> list[list[DynamicLoraLinear]]:
    """Let the adapted q, k and v of every attention of a model be computed together, in place.

    Returns:
        The adapted layers of each such attention, which read one tensor.
    """
    groups = []
    for module in model.modules():
        layers = [getattr(module, name, None) for name in QUERY_KEY_VALUE]
        adapted = [layer for layer in layers if isinstance(layer, DynamicLoraLinear)]
        alike = all(layer.in_features == adapted[0].in_features and layer.computes_as(adapted[0]) for layer in adapted)
        if len(adapted) > 1 and alike:
            SharedInput(adapted).attach(module)
            groups.append(adapted)
    return groups


class SharedInput:
    """Computes the outputs of layers for one tensor at the first call of one of them, and keeps them for the other
    calls within the same forward of their module.

    A call with another tensor (cross-attention, whose keys come from another sequence), or outside of the module's
    forward, is computed alone. After a forward that leaves outputs unused, nothing is computed ahead any more, and the
    log says so.

    Args:
        layers: the layers, in the order in which they are called.
    """

    def __init__(self, layers: Sequence[DynamicLoraLinear]) -> None:
        self._layers = list(layers)
        self._open = False
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: dict[int, Tensor] = {}

    def attach(self, module: nn.Module) -> None:
        """Serve the layers of this module from now on."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)
        for layer in self._layers:
            layer.shared = self

    def __call__(self, layer: DynamicLoraLinear, x: Tensor) -> Tensor:
        """Output of one of the layers."""
        place = self._layers.index(layer)
        if x.is_inference():
            # Such a tensor does not tell whether it has changed since the first call.
            return adapted_linears(x, operands([layer]), frozen([layer]))[0]
        if self._open and self._input is None:
            self._input, self._version = x, x._version
            outputs = adapted_linears(x, operands(self._layers), frozen(self._layers))
            self._outputs = dict(enumerate(outputs))
        if self._input is x and self._version == x._version and place in self._outputs:
            return self._outputs.pop(place)
        return adapted_linears(x, operands([layer]), frozen([layer]))[0]

    def _begin(self, *_: Any) -> None:
        self._open = True

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Drop everything at the end of the module's forward. ``output`` is None after an exception."""
        if self._outputs and output is not None:
            for layer in self._layers:
                layer.shared = None
            _say_given_up(type(module).__name__)
        self._open, self._input, self._outputs = False, None, {}


@cache  # once for all layers of a model
def _say_given_up(kind: str) -> None:
    say(
        f"a {kind} has called its {', '.join(QUERY_KEY_VALUE)} with different tensors, as cross-attention does: it "
        "computes them one by one from now on, with the same result"
    )
