"""Which adapters the servers vLLM and SGLang take, and the commands that serve them.

The rules are those of their sources in November 2026, in our words (vLLM: ``peft_helper.py``, ``lora_model.py`` and
``config/lora.py``; SGLang: ``lora.py``, ``lora_config.py`` and ``utils.py`` of its LoRA). The servers themselves have
not been run with these adapters (docs/tried.md).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from dora_dist.adapter.plain_lora import KEY_PREFIX, Factors
from dora_dist.base_model.shape import GATED_MLP, QUERY_KEY_VALUE
from dora_dist.config.format_version import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dora_dist.console import files
from dora_dist.runs.adapter_folder.generation import Needed

COMPUTED_TOGETHER = (QUERY_KEY_VALUE, GATED_MLP[:2])
"""Modules that both servers hold as one matrix. SGLang fails where an adapter has some of them and not the others."""
LARGEST_RANK = 512
"""The largest ``--max-lora-rank`` that vLLM has."""
Shapes = Mapping[str, tuple[int, ...]]
VLLM = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}"
SGLANG = (
    "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} --lora-paths NAME={folder}"
)


def with_neighbours(factors: Mapping[str, Factors], base: nn.Module) -> dict[str, Factors]:
    """Factors of rank 0 for every module that is computed together with one that has components.

    Args:
        factors: module name -> ``(A (k, in), B (out, k))``.
        base: the base, without adapter layers.

    Returns:
        ``factors`` and those of rank 0, ``(A (0, in), B (out, 0))``.
    """
    completed = dict(factors)
    for name in factors:
        parent, _, own = name.rpartition(".")
        for module in _together_with(own):
            neighbour = f"{parent}.{module}"
            if neighbour in completed or not hasattr(base.get_submodule(parent), module):
                continue
            linear: Any = base.get_submodule(neighbour)
            completed[neighbour] = torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0)
    return completed


def _together_with(module: str) -> tuple[str, ...]:
    return next((group for group in COMPUTED_TOGETHER if module in group), ())


def serve_lines(folder: Path, base: str, needed: Needed) -> list[str]:
    """For each server the command that serves an adapter, or why the server does not take it.

    Args:
        folder: folder of the adapter. In the commands it is ``{folder}``.
        base: name or path of the base.
        needed: what the base lacks of the adapter.
    """
    config = files.read_json(folder / ADAPTER_CONFIG)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return [
        _serve_line("vLLM", VLLM + needed.vllm("{folder}"), vllm_flaws(config, shapes), base, config["r"]),
        _serve_line("SGLang", SGLANG + needed.sglang("{folder}"), sglang_flaws(config, shapes), base, config["r"]),
    ]


def _serve_line(server: str, command: str, flaws: Collection[str], base: str, rank: int) -> str:
    if flaws:
        return f"{server} does not take it: {'; '.join(flaws)}"
    return command.format(base=quote(base), rank=rank, folder="{folder}")


def vllm_flaws(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Why vLLM refuses an adapter, or computes something else than PEFT; empty where it does neither.

    Args:
        config: content of ``adapter_config.json``.
        shapes: name of a tensor in ``adapter_model.safetensors`` -> its shape.
    """
    flaws = _common_flaws(config, shapes)
    if config["r"] > LARGEST_RANK:
        flaws.append(f"its rank is {config['r']}, and --max-lora-rank goes to {LARGEST_RANK}")
    if config.get("modules_to_save"):
        flaws.append(f"it has modules that are trained as a whole ({', '.join(config['modules_to_save'])})")
    return flaws


def sglang_flaws(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Why SGLang refuses an adapter, or computes something else than PEFT; arguments: see :func:`vllm_flaws`."""
    flaws = _common_flaws(config, shapes)
    if isinstance(config["target_modules"], str):
        flaws.append(f"target_modules is {config['target_modules']!r}, where it must be a list of names")
    modules = {name.removeprefix(KEY_PREFIX).rsplit(".lora_", 1)[0] for name in shapes}
    for module in sorted(modules):
        parent, _, own = module.rpartition(".")
        missing = [other for other in _together_with(own) if f"{parent}.{other}" not in modules]
        if missing:
            flaws.append(f"{parent} has {own} and not {missing[0]}")
            break
    return flaws


def _common_flaws(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    flaws = [f"{key} is {config[key]!r}" for key in ("use_dora", "lora_bias") if config.get(key)]
    if config.get("bias", "none") != "none":
        flaws.append(f"bias is {config['bias']!r}")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if patterns:
        flaws.append(f"its modules differ in rank or scale ({' and '.join(patterns)}), which not every version reads")
    if config.get("trainable_token_indices"):
        return [*flaws, "it holds rows of new tokens (adapter.new_tokens); --format merged has them in its weights"]
    strangers = [name for name in shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strangers:
        flaws.append(f"it holds {strangers[0]}, which is no factor of LoRA")
    return flaws
