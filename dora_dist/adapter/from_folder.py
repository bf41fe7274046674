"""Starting from an adapter that exists: any plain LoRA, of a run of this program or of PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.plain_lora import FoundLora, read_layers
from dora_dist.base_model.quantization import quantized_from
from dora_dist.base_model.shape import linear_layer
from dora_dist.config.adapter import DynamicLoraConfig


@dataclass(frozen=True, kw_only=True)
class FoundAdapter:
    """An adapter in a folder.

    Attributes:
        folder: the adapter's folder.
        layers: full name of the module in the base model -> its factors, without components that are 0.
        base_model: name or path of the base that it names as its own; None if it names none.
    """

    folder: Path
    layers: Mapping[str, FoundLora]
    base_model: str | None

    def identity(self) -> str:
        """Identifies the adapter by its contents, wherever it lies: number of layers, and 16 hexadecimal digits."""
        digest = sha256()
        for name, found in self.layers.items():
            digest.update(f"{name} {found.scale!r}".encode())
            for tensor in (found.lora_a, found.lora_b):
                digest.update(tensor.numpy().tobytes())
        return f"{len(self.layers)} layers, {digest.hexdigest()[:16]}"


def read_adapter(folder: str) -> FoundAdapter:
    """The adapter of ``adapter.start_from``.

    Raises:
        ValueError: as in :func:`~dora_dist.adapter.plain_lora.read_layers`.
    """
    path = Path(folder).expanduser()
    config, layers = read_layers(path, f"adapter.start_from is {folder}, which")
    return FoundAdapter(folder=path, layers=layers, base_model=config.get("base_model_name_or_path"))


def find_start(model: nn.Module, config: DynamicLoraConfig, slots: Mapping[str, int]) -> FoundAdapter | None:
    """The adapter of ``adapter.start_from``, proved to fit the run as a whole; None for a new adapter.

    Args:
        model: the base model; its layers may be on the meta device.
        config: configuration of the run's adapter.
        slots: name of an adapted layer -> number of components that it has room for.

    Raises:
        ValueError: as in :func:`read_adapter`; or a layer is not adapted in the run, has another shape, or has too few
            components at the start.
    """
    if config.start_from is None:
        return None
    found = read_adapter(config.start_from)
    where = f"adapter.start_from is {found.folder}"
    for name, lora in found.layers.items():
        if name not in slots:
            raise ValueError(
                f"{where}, which adapts {name}, but adapter.target_modules takes no such layer, with layers such as "
                f"{min(slots)}: the adapter is of another model, or adapter.target_modules (or adapter.ranks) is too "
                "narrow"
            )
        linear = linear_layer(model, name)
        wanted, shape = (linear.in_features, linear.out_features), (lora.lora_a.shape[1], len(lora.lora_b))
        if wanted != shape:
            raise ValueError(
                f"{where}, whose factors of {name} are for a layer of {shape[0]} x {shape[1]}, but it has {wanted[0]} "
                f"x {wanted[1]}: the adapter is of another model"
            )
        count, room = len(lora.lora_a), slots[name] if config.slots is None else config.start_rank
        if count > room:
            most = max(len(other.lora_a) for other in found.layers.values())
            raise ValueError(
                f"{where}, with {count} components in {name}, but this run starts with {room} there, so that some "
                f"would be lost: set adapter.initial_rank to {most} or more (with pruning.rule none "
                "adapter.target_rank, or adapter.ranks to the plan.json of its run)"
            )
    return found


@torch.no_grad()
def start_from(layers: Mapping[str, DynamicLoraLinear], found: FoundAdapter) -> None:
    """Put the components of an adapter into the first places of freshly initialized layers, with gates of 1: the model
    then computes what its base with that adapter does. All other components keep their start, and contribute nothing.

    Args:
        layers: adapted layers of the model, by name.
        found: the adapter that :func:`find_start` has returned.
    """
    for name, lora in found.layers.items():
        layer, count = layers[name], len(lora.lora_a)
        for values, place in (
            (lora.lora_a, layer.lora_a[:count]),
            (lora.lora_b * (lora.scale / layer.scale), layer.lora_b[:, :count]),
            (torch.ones(count), layer.gate[:count]),
        ):
            place.copy_(values)


def describe_start(found: FoundAdapter, model_path: str, slots: Mapping[str, int]) -> list[str]:
    """Remarks on the start, for the user."""
    ranks = [len(lora.lora_a) for lora in found.layers.values()]
    fresh = len(slots) - len(found.layers)
    others = f"; {fresh} layers that it does not have start afresh" * bool(fresh)
    remarks = [f"starting from {found.folder}: {len(ranks)} layers of rank {min(ranks)} to {max(ranks)}{others}"]
    if found.base_model is not None and _is_another(found.base_model, model_path):
        remarks.append(f"warning: {found.folder} was trained on {found.base_model}, but model.path is {model_path}")
    return remarks


def _is_another(base: str, other: str) -> bool:
    """Whether two bases, which may be copies or quantized, have different names."""
    return len({Path(quantized_from(path)).name for path in (base, other)}) > 1
