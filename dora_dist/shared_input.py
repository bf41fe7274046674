"""Adapted layers that one module calls with the same tensor, one after the other: the first call computes all.

Attention reads its input three times, for q, k and v. Computed together, their components read it once, and the three
parts of its gradient add up in place (:mod:`dora_dist.adapted_linear`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dora_dist.adapted_linear import adapted_linears
from dora_dist.layer import DynamicLoraLinear

READ_TOGETHER = ("q_proj", "k_proj", "v_proj")


def share_inputs(model: nn.Module) -> None:
    """Let the adapted q, k and v of every attention of a model be computed together, in place."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in READ_TOGETHER]
        adapted = [layer for layer in layers if isinstance(layer, DynamicLoraLinear)]
        if len(adapted) > 1 and len({layer.in_features for layer in adapted}) == 1:
            shared = SharedInput(adapted)
            for layer in adapted:
                layer.shared = shared


class SharedInput:
    """Outputs of layers for one tensor, until each has been asked for its own.

    A call with another tensor (cross-attention, whose keys are of another sequence) is always computed from that
    tensor; where outputs are left over then, nothing is computed ahead any more.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[DynamicLoraLinear]) -> None:
        self._layers = list(layers)
        self._state: tuple[int, bool, bool] | None = None
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, layer: DynamicLoraLinear, x: Tensor) -> Tensor:
        """Output of one of the layers."""
        state = (x._version, torch.is_grad_enabled(), layer.training)
        if self._input is x and self._state == state and id(layer) in self._outputs:
            output = self._outputs.pop(id(layer))
        else:
            if self._outputs:
                self._dissolve()
                return layer(x)
            self._input, self._state = x, state
            outputs = adapted_linears(x, [one.tensors() for one in self._layers])
            self._outputs = {id(one): output for one, output in zip(self._layers, outputs, strict=True)}
            output = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return output

    def _dissolve(self) -> None:
        self._input, self._outputs = None, {}
        for layer in self._layers:
            layer.shared = None
