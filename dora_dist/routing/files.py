"""A prompt-routed adapter on disk: ``routed_adapter.safetensors`` beside ``routed_adapter.json``.

The tensors are float32. ``MODULE.lora_A`` ``(r, in)`` and ``MODULE.lora_B`` ``(out, r)`` have the module's update at
gate 1 as their product. ``routers.BLOCK.pooler`` and ``routers.BLOCK.weight`` are the parameters of a
:class:`~dora_dist.routing.router.Router`. The JSON has the format's number, the base, the number of modules per prompt,
and the modules of every block in the order of a router's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapter.card import absolute_base, write_routed_card
from dora_dist.adapter.plain_lora import Factors, pad_rank
from dora_dist.config.format_version import ROUTED_ADAPTER
from dora_dist.console.files import read_json, write_json

FORMAT = 1
"""Incremented by changes after which older folders mean something else or cannot be read."""
TENSORS = "routed_adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class RoutedAdapter:
    """The contents of a routed adapter's folder.

    Attributes:
        factors: module name -> ``(A (r, in), B (out, r))``; r is the same for all.
        routers: parameter name -> parameter, over all routers.
        blocks: names of the modules of every block.
        modules_per_prompt: number of modules chosen in a block.
    """

    factors: Mapping[str, Factors]
    routers: Mapping[str, Tensor]
    blocks: list[list[str]]
    modules_per_prompt: int

    @property
    def rank(self) -> int:
        """The rank r of every module."""
        return len(next(iter(self.factors.values()))[0])


def write_routed_adapter(
    folder: Path,
    *,
    factors: Mapping[str, Factors],
    routers: Mapping[str, Tensor],
    blocks: Sequence[Sequence[str]],
    modules_per_prompt: int,
    base_model: str | None,
) -> None:
    """Write a folder that :func:`read_routed_adapter` reads.

    Args:
        folder: the folder to write, created if missing.
        factors: see :class:`RoutedAdapter`; lower ranks are padded with zeros to the highest.
        routers: see :class:`RoutedAdapter`.
        blocks: see :class:`RoutedAdapter`.
        modules_per_prompt: see :class:`RoutedAdapter`.
        base_model: name or path of the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = max(1, *(len(lora_a) for lora_a, _ in factors.values()))
    tensors = {f"routers.{name}": value.detach().float().cpu().contiguous() for name, value in routers.items()}
    for name, parts in factors.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = (part.contiguous() for part in pad_rank(parts, rank))
    save_file(tensors, folder / TENSORS)
    base_model = absolute_base(base_model)
    write_routed_card(folder, rank, len(factors), modules_per_prompt, base_model)
    about = {"format": FORMAT, "base_model": base_model, "modules_per_prompt": modules_per_prompt}
    write_json(folder / ROUTED_ADAPTER, {**about, "blocks": [list(names) for names in blocks]})


def is_routed(folder: Path) -> bool:
    """Whether a folder holds a prompt-routed adapter."""
    return (folder / ROUTED_ADAPTER).is_file()


def read_routed_adapter(folder: Path) -> RoutedAdapter:
    """Read a folder that :func:`write_routed_adapter` wrote.

    Raises:
        ValueError: the folder has another format, or a part is missing.
    """
    about: dict[str, Any] = read_json(folder / ROUTED_ADAPTER)
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder / ROUTED_ADAPTER} has format {about.get('format')}, but this version of dora-dist reads format "
            f"{FORMAT}: a later version wrote it. Update dora-dist"
        )
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} has no {TENSORS} beside its {ROUTED_ADAPTER}: copy the whole folder")
    tensors = load_file(folder / TENSORS)
    names = [name for block in about["blocks"] for name in block]
    wanted = {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    wanted |= {f"routers.{number}.{part}" for number in range(len(about["blocks"])) for part in ("pooler", "weight")}
    if tensors.keys() != wanted:
        odd = min(tensors.keys() ^ wanted)
        raise ValueError(
            f"{folder / TENSORS} does not fit {ROUTED_ADAPTER} (first difference {odd}): the folder is damaged"
        )
    return RoutedAdapter(
        factors={name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names},
        routers={name.removeprefix("routers."): v for name, v in tensors.items() if name.startswith("routers.")},
        blocks=about["blocks"],
        modules_per_prompt=about["modules_per_prompt"],
    )
