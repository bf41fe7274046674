"""Copies of a base that share its frozen tensors."""

import copy
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def share(base: Model) -> Model:
    """A copy of a model's modules, which may be changed at will, over the same tensors."""
    memo: dict[int, Any] = {}
    for module in base.modules():
        state = getattr(module, "quant_state", None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), state):
            memo[id(tensor)] = tensor
    return copy.deepcopy(base, memo)
