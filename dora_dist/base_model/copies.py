"""Copies of a base that share its frozen tensors."""

import copy
from typing import Any

from transformers import LlamaForCausalLM


def share(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Modules of their own, to be changed at will, over the same tensors."""
    memo: dict[int, Any] = {}
    for module in base.modules():
        state = getattr(module, "quant_state", None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), state):
            memo[id(tensor)] = tensor
    return copy.deepcopy(base, memo)
