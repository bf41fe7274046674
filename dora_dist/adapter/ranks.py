"""The number of components that each layer starts with: uniform, from a plan, or from a generator."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.shape import linear_layer
from dora_dist.config.adapter import MLP_ONLY, RANKS_FROM_DATA, RISING_WITH_DEPTH, STRATA, UNIFORM, DynamicLoraConfig
from dora_dist.console.files import write_json
from dora_dist.method.ranks import apportion, in_mlps, in_strata, rising_with_depth

PLAN_FORMAT = 1
"""Format of a plan, incremented by changes after which an older plan means something else."""
WEIGHTS = {MLP_ONLY: in_mlps, RISING_WITH_DEPTH: rising_with_depth, STRATA: in_strata}


def resolve_ranks(model: nn.Module, config: DynamicLoraConfig) -> dict[str, int]:
    """Full name of every adapted layer -> number of components that it has room for, in the order of the names.

    Args:
        model: the base model; its layers may be on the meta device.
        config: the adapter's configuration. A generator spends as many parameters as a uniform ``target_rank`` does.

    Raises:
        ValueError: ``target_modules`` matches nothing, or ``ranks`` names a file that is no plan, a plan that does not
            fit the model, or a generator that cannot give this model ranks.
    """
    names = resolve_targets(model, config.target_modules)
    linears = {name: linear_layer(model, name) for name in names}
    if config.ranks == UNIFORM or config.ranks in RANKS_FROM_DATA:
        return dict.fromkeys(names, config.num_slots)
    most = {name: min(linear.in_features, linear.out_features) for name, linear in linears.items()}
    if config.ranks not in WEIGHTS:
        return _planned(Path(config.ranks).expanduser(), most)
    costs = {name: linear.in_features + linear.out_features for name, linear in linears.items()}
    try:
        weights = WEIGHTS[config.ranks](names)
        ranks = apportion(weights, costs, config.target_rank * sum(costs.values()), most)
    except ValueError as error:
        raise ValueError(f"adapter.ranks is {config.ranks}, but {error}: set it to uniform, or to a plan") from None
    return {name: rank for name, rank in ranks.items() if rank}


def write_plan(path: Path, ranks: Mapping[str, int], origin: Mapping[str, Any]) -> None:
    """Write ranks as a plan.

    Args:
        path: the file to write.
        ranks: layer name -> number of components; may be 0.
        origin: where the ranks come from, for whoever reads the file; plain JSON.
    """
    write_json(path, {"format_version": PLAN_FORMAT, "ranks": dict(sorted(ranks.items())), "origin": origin})


def read_plan(path: Path) -> dict[str, int]:
    """Layer name -> rank, from a file that :func:`write_plan` has written.

    Raises:
        ValueError: there is no such file, or it is no plan.
    """
    if not path.is_file():
        raise ValueError(
            f"adapter.ranks is {path}, but there is no such file: give uniform, "
            f"{', '.join([*WEIGHTS, *RANKS_FROM_DATA])}, or the path of a plan, such as the plan.json of a finished run"
        )
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"adapter.ranks: {path} is no JSON: {error}") from None
    ranks = written.get("ranks") if isinstance(written, dict) else None
    if not isinstance(ranks, dict) or not ranks or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        raise ValueError(
            f'adapter.ranks: {path} is no plan, which is {{"format_version": {PLAN_FORMAT}, "ranks": {{"name of a '
            'layer": whole number, ...}}'
        )
    if written.get("format_version") != PLAN_FORMAT:
        raise ValueError(
            f"adapter.ranks: {path} has format_version {written.get('format_version')}, but this version of dora-dist "
            f"reads {PLAN_FORMAT}"
        )
    return ranks


def _planned(path: Path, most: Mapping[str, int]) -> dict[str, int]:
    ranks = {name: rank for name, rank in sorted(read_plan(path).items()) if rank}
    if not ranks:
        raise ValueError(f"adapter.ranks: {path} gives no layer a component")
    strange = [name for name in ranks if name not in most]
    if strange:
        raise ValueError(
            f"adapter.ranks: {path} names {strange[0]} ({len(strange)} of {len(ranks)} layers), which "
            f"adapter.target_modules does not take in this model, with layers such as {min(most)}: the plan is of "
            "another model, or adapter.target_modules is too narrow"
        )
    for name, rank in ranks.items():
        if rank > most[name]:
            raise ValueError(
                f"adapter.ranks: {path} gives {name} the rank {rank}, but {most[name]} is the largest that it can have"
            )
    return ranks
