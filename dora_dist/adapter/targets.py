"""Selects the linear layers of a model that get components."""

import re
from collections.abc import Mapping, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_dist.base_model.head import belongs_to, head_modules
from dora_dist.base_model.quantization import is_known_linear
from dora_dist.base_model.shape import text_decoder
from dora_dist.config.adapter import ALL_LINEAR


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that a specification selects, sorted; never the output head, nor any layer of a
    head that is trained as a whole.

    Args:
        model: the base model; quantized linear layers (bitsandbytes) count as linear.
        target_modules: ``all-linear`` (every linear layer of the text decoder that can be adapted), a regular
            expression that must match a full module name, or a list of names or name endings such as ``q_proj``.

    Raises:
        ValueError: the specification, or an entry of the list, matches no linear layer (the message lists what there
            is), or names a layer that cannot be adapted.
    """
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = None if output_embeddings is None else output_embeddings()
    trained = head_modules(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not belongs_to(name, trained)
    }
    if not linears:
        raise ValueError(f"target_modules {target_modules!r} matches no linear layer; there are none{_others(model)}")
    obstacles = _obstacles(model, linears)
    if target_modules == ALL_LINEAR:
        decoder = text_decoder(model)
        chosen = [name for name in sorted(linears) if not decoder or belongs_to(name, [decoder])]
        possible = [name for name in chosen if name not in obstacles]
        return possible or _refuse(chosen, target_modules, obstacles)
    names = _named(target_modules, linears)
    impossible = [name for name in names if name in obstacles]
    return _refuse(impossible, target_modules, obstacles) if impossible else names


def _named(target_modules: str | Sequence[str], linears: Mapping[str, nn.Module]) -> list[str]:
    """Full names of the layers that a regular expression or a list selects, sorted."""
    if isinstance(target_modules, str):
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
        f"target_modules {specification!r} matches no linear layer; there are {', '.join(endings)} "
        f"(full names such as {min(linears)}); a string other than {ALL_LINEAR!r} is a regular expression for full "
        "names, a list holds names or their last parts"
    )


def _others(model: nn.Module) -> str:
    """What a model without linear layers has instead, for the message; empty if that is not known."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        return ": this model is built of transformers' Conv1D, as GPT-2 is, which cannot be adapted here"
    return ""


def _refuse(names: Sequence[str], target_modules: object, obstacles: Mapping[str, str]) -> list[str]:
    endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    raise ValueError(
        f"target_modules {target_modules!r} takes {names[0]}, which {obstacles[names[0]]}: leave {endings} out of "
        "adapter.target_modules, or take another model"
    )


def _obstacles(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of a linear layer that cannot be adapted -> the reason, phrased to follow "which"."""
    found = {}
    by_ending: dict[str, str | None] = {}
    for name, module in linears.items():
        ending = name.rsplit(".", 1)[-1]
        if ending not in by_ending:
            by_ending[ending] = _obstacle_of_peft(model, ending)
        if not is_known_linear(module):
            found[name] = (
                f"is a {type(module).__qualname__}, a linear layer that computes in a way of its own (only "
                "torch.nn.Linear and bitsandbytes' Linear4bit and Linear8bitLt can be adapted)"
            )
        elif reason := by_ending[ending]:
            found[name] = reason
    return found


def _obstacle_of_peft(model: nn.Module, ending: str) -> str | None:
    """The reason why PEFT 0.21 cannot adapt layers whose names end in ``ending``, neither here nor when it loads the
    adapter; None if it can.

    For some model types, it takes ``gate_proj`` and other names for those of experts that were linear layers before
    transformers 5, and makes them parameters of the fused experts, even if they belong to a shared expert or a dense
    MLP. In Mamba's layers, kernels read the weight of ``out_proj`` and bypass the layer.
    ``tests/unit/adapter/test_architectures.py`` fails when either can go.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    config = LoraConfig(target_modules=[ending])
    try:
        _check_lora_target_modules_mamba(config, model, ending)
    except ValueError:
        return f"PEFT does not adapt in a {kind}, where kernels read its weight and pass the layer by"
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        pass  # it wants all parts of a fused parameter, of which this is one
    else:
        if ending in (config.target_modules or ()):
            return None
    return f"PEFT takes for a part of the fused experts of a {kind}"
