"""Starting from an adapter that exists: any plain LoRA, of a run of this program or of PEFT."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.plain_lora import KEY_PREFIX, no_plain_lora, without_padding
from dora_dist.base_model.quantization import quantized_from
from dora_dist.base_model.shape import linear_layer
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.format_version import ADAPTER_CONFIG, ADAPTER_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class FoundLora:
    """Plain LoRA of one layer, whose update is ``scale * B A``.

    Attributes:
        lora_a: shape ``(k, in)``, float32.
        lora_b: shape ``(out, k)``, float32.
        scale: as PEFT makes it of alpha and rank.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class FoundAdapter:
    """An adapter in a folder.

    Attributes:
        folder: where it is.
        layers: full name of the module in the base model -> its factors, without components that are 0.
        base_model: what it was trained on, as it says; None where it does not.
    """

    folder: Path
    layers: Mapping[str, FoundLora]
    base_model: str | None

    def identity(self) -> str:
        """What tells it from others, wherever it lies: number of layers, and 16 hexadecimal digits."""
        digest = sha256()
        for name, found in self.layers.items():
            digest.update(f"{name} {found.scale!r}".encode())
            for tensor in (found.lora_a, found.lora_b):
                digest.update(tensor.numpy().tobytes())
        return f"{len(self.layers)} layers, {digest.hexdigest()[:16]}"


def read_adapter(folder: str) -> FoundAdapter:
    """The adapter of ``adapter.start_from``.

    Raises:
        ValueError: there is none in the folder, or it computes something else than plain LoRA.
    """
    path = Path(folder).expanduser()
    where = f"adapter.start_from is {folder}"
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise ValueError(
                f"{where}, which has no {name}: give the folder of a plain LoRA adapter, such as RUN/adapter (looked "
                f"from {Path.cwd()})"
            )
    try:
        config: dict[str, Any] = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / ADAPTER_WEIGHTS)
    except Exception as error:  # safetensors has one of its own, in Rust
        raise ValueError(f"{where}, which cannot be read: {error}") from None
    if reason := no_plain_lora(config, tensors):
        raise ValueError(f"{where}, which {reason}: only plain LoRA can be gone on with, whose update is B A")
    names = sorted({key.removeprefix(KEY_PREFIX).rsplit(".lora_", 1)[0] for key in tensors})
    layers = {}
    for name in names:
        lora_a, lora_b = (tensors[f"{KEY_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise ValueError(f"{where}, whose factors of {name} are not finite: take another checkpoint")
        used_a, used_b = without_padding(lora_a, lora_b)
        layers[name] = FoundLora(lora_a=used_a, lora_b=used_b, scale=_scale(config, name, len(lora_a)))
    return FoundAdapter(folder=path, layers=layers, base_model=config.get("base_model_name_or_path"))


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """As PEFT has it: alpha over the rank, or over its root (rsLoRA), of the patterns that match the layer."""
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def find_start(model: nn.Module, config: DynamicLoraConfig, slots: Mapping[str, int]) -> FoundAdapter | None:
    """The adapter of ``adapter.start_from``, all of which the run can go on with; None for a new adapter.

    Args:
        model: the base model; its layers may be on the meta device.
        config: of the adapter of the run.
        slots: layer that is adapted -> components that it has room for.

    Raises:
        ValueError: as of :func:`read_adapter`; or a layer is not adapted in the run, has another shape, or has too few
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
    """Put the components of an adapter into the first places of layers at their start, with gates of 1: the model then
    computes what the adapter's does. All other components stay as they start, and contribute nothing.

    Args:
        layers: of the model, by name.
        found: as of :func:`find_start`.
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
    """What a user should know of the start, a remark each."""
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
