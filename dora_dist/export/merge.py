"""A plain model whose weights are those of a base plus an adapter's update."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dora_dist.adapter.plain_lora import NewRows
from dora_dist.base_model.quantization import dequantized_weight


@torch.no_grad()
def merge_into(
    plain: nn.Module, base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], new_rows: NewRows | None = None
) -> None:
    """Overwrite every parameter of ``plain`` with that of ``base``, dequantized, plus the adapter's update, in float32.

    Args:
        plain: unquantized model of the same architecture, in float32.
        base: the base, perhaps quantized, without adapter layers.
        factors: module name -> ``(A (k, in), B (out, k))``; the update of its weight is ``B A``.
        new_rows: rows of new tokens, which take the place of the base's; None without.

    Raises:
        ValueError: the adapter adapts a module that is no linear layer.
    """
    for name in factors:
        if not isinstance(module := base.get_submodule(name), nn.Linear):
            raise ValueError(
                f"the adapter adapts {name}, which is a {type(module).__name__} and no linear layer, so that its "
                "update cannot be added to a weight here: take --format peft or compact"
            )
    for name, module in plain.named_modules():
        source = base.get_submodule(name)
        for part, parameter in module.named_parameters(recurse=False):
            if part == "weight" and isinstance(source, nn.Linear):
                value = merged_weight(source, factors.get(name))
            else:
                value = getattr(source, part)
            parameter.copy_(value)
    if new_rows is not None:
        for name, rows in new_rows.rows.items():
            plain.get_parameter(f"{name}.weight")[list(new_rows.ids)] = rows


def merged_weight(source: nn.Linear, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """``W + B A`` in float32, shape ``(out, in)``; W alone for a layer without adapter."""
    weight = dequantized_weight(source)
    if factors is None:
        return weight
    lora_a, lora_b = (factor.to(weight) for factor in factors)
    return weight + lora_b @ lora_a


@torch.no_grad()
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters in place. Unlike ``model.to``, leaves buffers (such as rotary frequencies) as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
