"""How step time, and the adapter's share of it, grow with layers, width, rank, and the number of ranks (processes).

The processes run on this machine over gloo. Each takes a data-parallel step: adapter gradients averaged in one
flat all-reduce (not DeepSpeed's engine), and the method's own exchanges. With any number of processes, each has the
same number of threads (the cores divided by the largest number), so that only the number of processes changes.
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dora_dist.benchmark.growth.point import measure_point
from dora_dist.benchmark.growth.rank_process import POINT, run_rank
from dora_dist.benchmark.options import ADALORA, Options
from dora_dist.benchmark.shapes import Shape, llama_like
from dora_dist.distributed.agreement import Agreement

LAYERS, HIDDEN, RANKS = (2, 4, 8, 16), (256, 512, 1024, 2048), (4, 8, 12, 16, 32, 64)
QUICK_LAYERS, QUICK_HIDDEN, QUICK_RANKS = (1, 2), (64, 128), (4, 8)
MOST_WORLD = 4


def measure_growth(options: Options, agreement: Agreement) -> dict[str, Any]:
    """Measure all points along four axes."""
    options = replace(options, contestants=tuple(name for name in options.contestants if name != ADALORA))
    quick = options.quick
    few, narrow, shallow = (1, 64, 1) if quick else (4, 512, 2)
    points: dict[str, list[dict[str, Any]]] = {"layers": [], "hidden": [], "rank": []}
    for layers in QUICK_LAYERS if quick else LAYERS:
        points["layers"].append(measure_point(layers, _sized(narrow, layers, options), options, agreement))
    for hidden in QUICK_HIDDEN if quick else HIDDEN:
        points["hidden"].append(measure_point(hidden, _sized(hidden, shallow, options), options, agreement))
    for rank in QUICK_RANKS if quick else RANKS:
        ranked = replace(options, rank=rank, target_rank=max(1, 2 * rank // 3))
        points["rank"].append(measure_point(rank, _sized(narrow, few, options), ranked, agreement))
    points["world"] = _worlds(_sized(narrow, few, options), options)
    return {"what": __doc__, "points": points}


def world_sizes() -> list[int]:
    """Numbers of processes for which this machine has enough cores."""
    cores = len(os.sched_getaffinity(0))
    return [size for size in (1, 2, MOST_WORLD) if size <= max(2, cores)]


def _sized(hidden: int, layers: int, options: Options) -> Shape:
    """A shape of this size, with rows like those of the first requested shape."""
    first = options.shapes[0]
    return replace(llama_like(hidden, layers), sequence=first.sequence, batch=first.batch, vocabulary=first.vocabulary)


def _worlds(shape: Shape, options: Options) -> list[dict[str, Any]]:
    sizes = world_sizes()
    threads = max(1, len(os.sched_getaffinity(0)) // sizes[-1])
    points = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (size, threads, Path(folder), shape, options)
            torch.multiprocessing.spawn(run_rank, arguments, nprocs=size)
            points.append(json.loads((Path(folder) / POINT).read_text()))
    return points


def growth_rows(record: dict[str, Any]) -> list[list[str]]:
    """Rows of a table."""
    rows = [["axis", "contestant", "value", "ms/step", "adapter's share"]]
    for axis, points in record["points"].items():
        for point in points:
            for name, figures in point["contestants"].items():
                share = f"{figures['share']['median']:.1%}" if "share" in figures else "-"
                rows.append([axis, name, str(point["value"]), f"{1e3 * figures['seconds']['median']:.1f}", share])
    return rows
