"""Which linear layers of a model get components."""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from dora_dist.base_model.head import belongs_to, head_modules
from dora_dist.config.adapter import ALL_LINEAR


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that a specification means, sorted; never the output head, nor any layer of a
    head that is trained as a whole.

    Args:
        model: the base model; quantized linear layers (bitsandbytes) count as linear.
        target_modules: ``all-linear`` (every linear layer), a regular expression that must match
            a full module name, or a list of names or name endings such as ``q_proj``.

    Raises:
        ValueError: the specification, or an entry of the list, matches no linear layer; the message lists what
            there is.
    """
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = None if output_embeddings is None else output_embeddings()
    trained = head_modules(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not belongs_to(name, trained)
    }
    if isinstance(target_modules, str):
        if target_modules == ALL_LINEAR:
            return _non_empty(sorted(linears), target_modules, linears)
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules {target_modules!r} is not a regular expression: {error}") from None
        return _non_empty([name for name in sorted(linears) if pattern.fullmatch(name)], target_modules, linears)
    chosen: set[str] = set()
    for entry in target_modules:
        matches = [name for name in linears if name == entry or name.endswith(f".{entry}")]
        chosen.update(_non_empty(matches, entry, linears))
    return _non_empty(sorted(chosen), target_modules, linears)


def _non_empty(names: list[str], specification: object, linears: Mapping[str, nn.Module]) -> list[str]:
    if names:
        return names
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    raise ValueError(
        f"target_modules {specification!r} matches no linear layer; there are {', '.join(endings) or 'none'} "
        f"(full names such as {min(linears, default='-')}); a string other than {ALL_LINEAR!r} is a regular "
        "expression for full names, a list holds names or their last parts"
    )
