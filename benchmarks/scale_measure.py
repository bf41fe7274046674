"""Measurements behind ``agreement_scale.py``: the project's own code, on real local ranks and by itself.

Other work on the machine can only lengthen a measurement, so that the least of many repeats stands for the constant;
medians are kept beside it.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from scale_model import Shape
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.agreement import Agreement, digest_tensors
from dora_dist.method.allocation import select_components
from dora_dist.method.budget import Budget
from dora_dist.method.importance import component_scores
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController

INITIAL_RANK, TARGET_RANK = 12, 8
REDUCED = (224 * 12, 560 * 12, 882 * 12, 100_000, 1_000_000)
"""Numbers of scores that are averaged: those of 8B, 70B and 405B, and more, to tell bandwidth from latency."""
GATHERED = (4, 47, 1_000, 100_000, 1_000_000)
"""Approximate sizes in bytes of gathered objects as pickled: the first two are a failure that is none, and a digest."""

BATCH = 4
"""Number of exchanges in one timing."""

Timing = dict[str, float]


def repeat(action: Callable[[], Any], times: int, batch: int = 1) -> Timing:
    """Time an action: the least and the median of its seconds, and the number of repeats.

    Args:
        action: the action to be timed.
        times: number of timings.
        batch: number of actions of one timing, one after the other. A rank that comes last into an exchange sees only
            its end; over several exchanges, each rank waits for the one before.
    """
    found = []
    for _ in range(times):
        started = time.perf_counter()
        for _ in range(batch):
            action()
        found.append((time.perf_counter() - started) / batch)
    return {"least": min(found), "median": statistics.median(found), "repeats": times}


def merge(passes: Sequence[Any]) -> Any:
    """Merge measurements of several passes over everything: the least of all, the median of the medians."""
    first = passes[0]
    if not isinstance(first, dict):
        return first
    if "least" not in first:
        return {key: merge([each[key] for each in passes]) for key in first}
    return {
        **first,
        "least": min(each["least"] for each in passes),
        "median": statistics.median(each["median"] for each in passes),
        "repeats": sum(each["repeats"] for each in passes),
    }


def make_controller(shape: Shape, dtype: torch.dtype, agreement: Agreement) -> DynamicRankController:
    """The real controller over real adapters; the frozen weights, which it never reads, take no memory.

    Every step is an event, and none of the first thousand is the final one.
    """
    layers = {}
    for number in range(shape.blocks):
        for kind, (inputs, outputs) in enumerate(shape.linears):
            base = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device="meta")
            base.weight = nn.Parameter(torch.zeros(1).expand(outputs, inputs), requires_grad=False)
            layer = DynamicLoraLinear(base, "default", config=LoraConfig(), r=INITIAL_RANK, lora_alpha=8)
            for parameter in (layer.lora_a, layer.lora_b, layer.gate):
                parameter.data = torch.full_like(parameter, 0.01, dtype=dtype)
            # Enough difference that no two components have the same score.
            layer.gate.data += torch.arange(INITIAL_RANK) * 1e-2 + kind * 1e-3
            layers[f"model.layers.{number}.linear.{kind}"] = layer
    schedule = BudgetSchedule(10_000, len(layers), INITIAL_RANK, TARGET_RANK, 0.0, 0.5, 1)
    return DynamicRankController(layers, Budget(schedule, dict.fromkeys(layers, 1)), agreement)


class Events:
    """One event after another on a controller."""

    def __init__(self, controller: DynamicRankController) -> None:
        self.controller = controller

    def __call__(self) -> None:
        event = self.controller.after_optimizer_step(self.controller.step + 1)
        assert event is not None


def measure_collectives(agreement: Agreement, times: int) -> dict[str, Timing]:
    """Every kind of exchange of :class:`Agreement`, at several sizes."""
    found = {"any": repeat(lambda: agreement.any(False), times, BATCH)}
    for size in REDUCED:
        flat = torch.zeros(size, dtype=torch.float64)
        found[f"mean {8 * size}"] = repeat(partial(agreement.mean, flat), times, BATCH)
    for size in GATHERED:
        value = None if size == 4 else bytes(max(32, size))
        found[f"gather {size}"] = repeat(partial(agreement.gather, value), times, BATCH)
    return found


def measure_rank(shape: Shape | None, times: int) -> dict[str, Any]:
    """Measurements of one rank of a world: of exchanges, or, if a shape is given, of events and digests of that
    shape."""
    agreement = Agreement()
    if shape is None:
        return measure_collectives(agreement, times)
    controller = make_controller(shape, torch.float32, agreement)
    controller.verify("the start")
    return {"event": repeat(Events(controller), times), "verify": repeat(lambda: controller.verify("x"), times)}


def _rank_main(rank: int, size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    found = measure_rank(*arguments)
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    dist.barrier()
    os._exit(0)  # gloo's threads need no farewell


def on_ranks(size: int, *arguments: Any) -> dict[str, Any]:
    """:func:`measure_rank` on ``size`` local ranks over gloo; what the first of them measured."""
    # A server that has the imports behind it forks them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scale_measure"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank_main, args=(rank, size, folder, arguments)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(600)
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()
            sys.exit(f"{size} ranks ended with {[process.exitcode for process in ranks]}")
        return torch.load(Path(folder) / "found")


def measure_unpacking(sizes: Sequence[int], times: int) -> dict[str, dict[int, Timing]]:
    """Cost of ``Agreement.gather`` for a rank, without any network: torch's fake group answers with the rank's own
    values, so that packing, size comparison and unpickling of n objects are the real code at the real n."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names = [f"model.layers.{number}.linear.{kind}" for number in range(126) for kind in range(7)]
    parts = {name: bytes(32) for name in names}
    found: dict[str, dict[int, Timing]] = {"digest": {}, "any": {}, "parts of 405B": {}}
    for size in sizes:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        agreement = Agreement()
        found["digest"][size] = repeat(partial(agreement.gather, bytes(32)), times)
        found["any"][size] = repeat(partial(agreement.any, False), times)
        found["parts of 405B"][size] = repeat(partial(agreement.gather, parts), 3)
        dist.destroy_process_group()
    return found


def measure_hash() -> dict[str, Timing]:
    """``digest_tensors`` on 64 MiB in one tensor, and on the bytes of one adapted layer of 8B in four tensors."""
    large = torch.ones(2**24)
    parts = [torch.ones(12, 4096), torch.ones(12), torch.ones(4096, 12), torch.ones(12, dtype=torch.bool)]
    return {
        "64 MiB": {**repeat(lambda: digest_tensors(large), 15), "bytes": large.nbytes},
        "one layer": {**repeat(lambda: digest_tensors(*parts), 300), "bytes": sum(part.nbytes for part in parts)},
    }


def measure_alone(shape: Shape, dtype: torch.dtype, times: int) -> dict[str, Timing]:
    """The parts of an event that need no other rank, at the real shape, in one thread."""
    controller = make_controller(shape, dtype, Agreement())
    scores = {name: torch.rand(INITIAL_RANK, dtype=torch.float64) for name in controller.layers}
    keep = TARGET_RANK * len(scores)
    kept = {name: torch.arange(INITIAL_RANK) < TARGET_RANK for name in scores}
    return {
        "verify": repeat(lambda: controller.verify("x"), times),
        "scoring": repeat(controller._update_scores, times),
        "select_components": repeat(lambda: select_components(scores, keep), 10 * times),
        "apply": repeat(lambda: controller.rule.apply(1, controller.kept, kept, None), 10 * times),
    }


class _Count(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views launch nothing.
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def scoring_operations() -> int:
    """Operations of scoring one layer: kernels that a GPU would launch."""
    with _Count() as count:
        component_scores(torch.ones(12, 64), torch.ones(12), torch.ones(64, 12))
    return count.operations
