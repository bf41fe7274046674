"""Takes each layer of a base as soon as its weights have been read and quantized, before the next one is read."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from transformers import PreTrainedModel, core_model_loading

from dora_dist.base_model.quantization import keep_for_shards
from dora_dist.base_model.recomputation import recomputable_layers

TakeLayer = Callable[[nn.Module], None]
"""Reduces a frozen layer, in place, to what this rank is to hold."""


class LayersTaken:
    """Calls ``take`` once with every layer of a model, when all of its parameters are there.

    Args:
        take: function that is called with each complete layer.
        prepare: function that is called with the layer before that, or None.
    """

    def __init__(self, take: TakeLayer, prepare: TakeLayer | None = None) -> None:
        self._take = take
        self._prepare = prepare
        self._missing: dict[nn.Module, set[str]] = {}
        self._taken: set[nn.Module] = set()

    @contextmanager
    def while_loading(self) -> Iterator[None]:
        """Within this context, ``from_pretrained`` hands on each layer before it reads the next one.

        transformers (5.23) sets weights by ``set_param_for_module``, in the order of their names, and has no hook for
        a complete layer. Without quantization, it reads ahead with several threads, which ``HF_DEACTIVATE_ASYNC_LOAD``
        turns off. It also allocates the size of the whole model on a GPU beforehand, which is turned off here.
        """
        set_parameter = core_model_loading.set_param_for_module

        def set_and_take(model: PreTrainedModel, target_name: str, *args: Any, **kwargs: Any) -> None:
            set_parameter(model, target_name, *args, **kwargs)
            self._given(model, target_name)

        with (
            mock.patch.object(core_model_loading, "set_param_for_module", set_and_take),
            mock.patch("transformers.modeling_utils.caching_allocator_warmup"),
            mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
        ):
            yield

    def _given(self, model: PreTrainedModel, parameter: str) -> None:
        self._missing = self._missing or _parameters_of_layers(model)
        for layer, names in self._missing.items():
            if parameter in names:
                names.remove(parameter)
                # transformers leaves out weights of a wrong shape, and reports them when all are read.
                if not names and not any(one.is_meta for one in layer.parameters()):
                    self._hand_on(layer)

    def take_the_rest(self, model: PreTrainedModel) -> None:
        """Hand on the layers that have not been handed on yet, now that the model is complete."""
        for layer in recomputable_layers(model):
            if layer not in self._taken:
                self._hand_on(layer)

    def _hand_on(self, layer: nn.Module) -> None:
        layer.requires_grad_(False)
        if self._prepare is not None:
            self._prepare(layer)
        keep_for_shards(layer)
        self._take(layer)
        self._taken.add(layer)
        for parameter in layer.parameters():
            # Otherwise transformers gives random values to parameters that it has not marked as read, shards too.
            vars(parameter)["_is_hf_initialized"] = True


def _parameters_of_layers(model: PreTrainedModel) -> dict[nn.Module, set[str]]:
    """Layer -> full names of its parameters."""
    names = {module: name for name, module in model.named_modules()}
    return {
        layer: {f"{names[layer]}.{name}" for name, _ in layer.named_parameters()}
        for layer in recomputable_layers(model)
    }
