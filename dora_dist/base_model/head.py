"""The head: the part of a model that a task puts on top of the base. Finds it and starts its parameters.

A checkpoint of a pretrained encoder has no weights for it. It is neither quantized nor adapted, but trained as a whole.
"""

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.config.tasks import CAUSAL_LM, SEQ2SEQ, TASKS, Task

INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh weights where the model's configuration has no ``initializer_range``."""


def task_of(model: nn.Module) -> Task:
    """The task of a model, by the names of its class and parent classes, and by whether it has an encoder beside its
    decoder."""
    names = [parent.__name__ for parent in type(model).__mro__]
    for task in TASKS.values():
        if task.class_ending and any(name.endswith(task.class_ending) for name in names):
            return task
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return TASKS[SEQ2SEQ if encoder_decoder else CAUSAL_LM]


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that form the head: all that lie beside the base and have parameters. Empty for a language
    model, whose output head belongs to the base.

    Raises:
        ValueError: the task needs a head, but it cannot be told from the base.
    """
    if not task_of(model).trains_head:
        return []
    base = getattr(model, "base_model_prefix", "")
    names = [
        name for name, child in model.named_children() if name != base and next(child.parameters(), None) is not None
    ]
    if not names or len(names) == len(list(model.named_children())):
        raise ValueError(
            f"in a {type(model).__name__} the head cannot be told from the base ({base!r}; there are "
            f"{', '.join(name for name, _ in model.named_children())}): take a model class of transformers"
        )
    return names


def belongs_to(name: str, modules: Collection[str]) -> bool:
    """Whether ``name``, of a parameter or module, is one of ``modules`` or lies in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@torch.no_grad()
def start_parameters(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Give parameters of the head fresh values, as transformers does: weights normal, norms 1, biases 0.

    The values depend only on ``seed`` and the parameter's name, not on the global random state or the process.

    Raises:
        ValueError: a parameter is neither a weight nor a bias.
    """
    deviation = getattr(model.config, "initializer_range", None) or INITIAL_DEVIATION
    for name in sorted(names):
        parameter = model.get_parameter(name)
        kind = name.rpartition(".")[2]
        if kind == "bias":
            value = torch.zeros(parameter.shape)
        elif kind == "weight" and parameter.ndim == 1:
            value = torch.ones(parameter.shape)
        elif kind == "weight":
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            value = torch.empty(parameter.shape).normal_(0, deviation, generator=generator)
        else:
            raise ValueError(
                f"{name} of the head of {type(model).__name__} is neither a weight nor a bias, and the model's files "
                "have no value for it: give a model that was trained for this task"
            )
        parameter.data.copy_(value)


def read_in_own_dtype(head: nn.Module) -> None:
    """Register hooks that give every layer of a head its input in the dtype of its weight: the base may compute in 16
    bits while the head is kept in float32. Under autocast, they are not needed."""

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return tuple(
            value.to(weight.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in inputs
        )

    for module in head.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.register_forward_pre_hook(cast)
