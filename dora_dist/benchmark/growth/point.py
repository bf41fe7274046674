"""Measures one point: the contestants in turns, on one shape, with one rank of the adapter and one number of ranks."""

from functools import partial
from typing import Any

import torch

from dora_dist.benchmark.comparison import start, time_in_turns
from dora_dist.benchmark.contestants import Conditions, build
from dora_dist.benchmark.options import FLOOR, Options
from dora_dist.benchmark.paired import adapter_share, spread
from dora_dist.benchmark.shapes import Shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement


def measure_point(
    value: int, shape: Shape, options: Options, agreement: Agreement, average: bool = False
) -> dict[str, Any]:
    """Figures of all contestants at one value of an axis."""
    say(f"{shape.name}, rank {options.rank}, {agreement.size} ranks")
    base = build_base(shape, agreement.device, getattr(torch, options.compute_dtype), options.seed)
    conditions = Conditions(base=base, options=options, agreement=agreement, average=average)
    make = partial(build, conditions=conditions)
    rows = partial(random_rows, shape, agreement.device, options.seed, agreement.rank)
    contestants = start(make, options.contestants, rows)
    mine = time_in_turns(contestants, rows, options.warmup, options.rounds, agreement.device)
    by_rank = agreement.gather(mine)
    # The slowest rank's time: a step of the world ends with its last rank.
    seconds = {name: [max(times) for times in zip(*(one[name] for one in by_rank), strict=True)] for name in mine}
    figures: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        figures[name] = {"seconds": spread(times), "times": times}
        if FLOOR in seconds and name != FLOOR:
            figures[name]["share"] = adapter_share(times, seconds[FLOOR])
    shown = {"hidden": shape.hidden, "layers": shape.layers, "rank": options.rank, "world": agreement.size}
    return {"value": value, **shown, "threads": torch.get_num_threads(), "contestants": figures}
