"""Measures all contestants on one shape: in turns for time, one after another for memory."""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dora_dist.benchmark.contestants import (
    Contestant,
    DynamicContestant,
    PrunedContestant,
    all_conditions,
    build,
    check_gradients,
    check_same_start,
)
from dora_dist.benchmark.options import DYNAMIC, FLOOR, LORA, PRUNED, Options
from dora_dist.benchmark.paired import summarize, turns
from dora_dist.benchmark.peak import PeakMeter, clock
from dora_dist.benchmark.shapes import Shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.console.text import MIB, say
from dora_dist.distributed.agreement import Agreement

PROFILE_ROWS = 60


def compare(shape: Shape, options: Options, agreement: Agreement) -> list[dict[str, Any]]:
    """Compare the contestants; one record for each checkpointing setting and each dropout.

    Raises:
        RuntimeError: contestants do different work.
    """
    device = agreement.device
    gc.collect()
    meter = PeakMeter(device)
    say(f"{shape.name}: a random base in NF4")
    base = build_base(shape, device, getattr(torch, options.compute_dtype), options.seed)
    records = []
    for conditions in all_conditions(shape, base, options, agreement):
        make = partial(build, conditions=conditions)
        rows = partial(random_rows, shape, device, options.seed, agreement.rank)
        peaks = {name: _peak(make, name, rows, meter) for name in options.contestants}
        contestants = start(make, options.contestants, rows)
        seconds = time_in_turns(contestants, rows, options.warmup, options.rounds, device)
        record = {
            "shape": shape.name,
            "checkpointing": conditions.checkpointing,
            "dropout": conditions.dropout,
            "sequence": shape.sequence,
            "batch": shape.batch,
            "vocabulary": shape.vocabulary,
            "model_flops_of_step": shape.step_flops,
            "contestants": _figures(seconds, peaks, shape, options.peak_tflops),
        }
        record |= _own_figures(contestants, rows, options.rounds, device)
        if options.profile:
            record["profile"] = _profile(contestants[options.profile], rows(0), device)
        records.append(record)
        del contestants
        _forget(device)
    return records


def start(
    make: Callable[[str], Contestant], names: Sequence[str], rows: Callable[[int], Tensor]
) -> dict[str, Contestant]:
    """Prepared contestants that are checked to start from the same function and to train.

    Raises:
        RuntimeError: a check failed.
    """
    contestants = {name: make(name) for name in names}
    check_same_start(contestants, rows(0))
    check_gradients(contestants, rows(0))
    for contestant in contestants.values():
        contestant.prepare(rows)
    return contestants


def time_in_turns(
    contestants: Mapping[str, Contestant],
    rows: Callable[[int], Tensor],
    warmup: int,
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of every step by contestant; in each round, all contestants take a step on the same rows."""
    now = clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(warmup + rounds), desc="rounds", leave=False, disable=None):
        batch = rows(number)
        for name in turns(list(contestants), number):
            contestants[name].agreement.barrier()
            began = now()
            contestants[name].step(batch)
            if number >= warmup:
                seconds[name].append(now() - began)
    return seconds


def _peak(make: Callable[[str], Contestant], name: str, rows: Callable[[int], Tensor], meter: PeakMeter) -> int:
    """Peak memory of a contestant when only the base is in memory beside it."""
    contestant = make(name)
    contestant.prepare(rows)
    peak = meter.of_second(partial(contestant.step, rows(0)))
    del contestant
    _forget(meter.device)
    return peak


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _figures(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int], shape: Shape, peak_tflops: float | None
) -> dict[str, dict[str, Any]]:
    found = summarize(seconds, FLOOR, LORA, shape.tokens)
    for name, figures in found.items():
        tflops = shape.step_flops / figures["seconds"]["median"] / 1e12
        figures["peak_bytes"] = peaks[name]
        figures["memory_ratio"] = peaks[name] / peaks[LORA]
        figures["model_tflops_per_second"] = tflops
        figures["model_flops_utilisation"] = tflops / peak_tflops if peak_tflops else None
        figures["times"] = list(seconds[name])
    return found


def _own_figures(
    contestants: Mapping[str, Contestant], rows: Callable[[int], Tensor], times: int, device: torch.device
) -> dict[str, Any]:
    """Times of the method's own parts in a step, and the ranks it has kept."""
    found: dict[str, Any] = {}
    dynamic, pruned = contestants.get(DYNAMIC), contestants.get(PRUNED)
    if isinstance(dynamic, DynamicContestant):
        now = clock(device)
        measured = [dynamic.step_in_parts(rows(number), now) for number in range(times)]
        parts = {name: median(one[name] for one in measured) for name in measured[0]}
        step = parts.pop("step")
        share = median(sum(one[name] for name in parts) / one["step"] for one in measured)
        found["method"] = {"seconds": parts, "step_seconds": step, "share_of_step": share, "times": measured}
    if isinstance(pruned, PrunedContestant):
        found["kept_ranks"] = pruned.kept_ranks()
    return found


def _profile(contestant: Contestant, batch: Tensor, device: torch.device) -> str:
    """Table of the operations in one step, the longest first."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        contestant.step(batch)
        clock(device)()
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=60)
    return table


def comparison_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table: one for every contestant of every comparison; ratios are relative to PEFT's LoRA."""
    with_share = any(
        figures["model_flops_utilisation"] is not None
        for record in records
        for figures in record["contestants"].values()
    )
    header = ["shape", "checkpointing", "contestant", "ms/step", "tokens/s", "time", "quartiles", "own cost"]
    rows = [[*header, "to floor", "peak MiB", "memory", "TFLOP/s", *(["MFU"] if with_share else [])]]
    for record in records:
        for name, figures in record["contestants"].items():
            ratio, floor = figures["time_ratio"], figures.get("to_floor")
            own = figures.get("own_cost")
            row = [record["shape"], "on" if record["checkpointing"] else "off", name]
            row += [f"{1e3 * figures['seconds']['median']:.1f}", f"{figures['tokens_per_second']:,.0f}"]
            row += [f"{ratio['median']:.3f}", f"{ratio['lower_quartile']:.3f}-{ratio['upper_quartile']:.3f}"]
            row += ["-" if own is None else f"{own:.2f}", "-" if floor is None else f"{floor['median']:.3f}"]
            row += [f"{figures['peak_bytes'] / MIB:.1f}", f"{figures['memory_ratio']:.3f}"]
            row += [f"{figures['model_tflops_per_second']:.3f}"]
            if with_share:
                row.append(f"{figures['model_flops_utilisation']:.1%}")
            if record["dropout"]:
                row[2] += f" (dropout {record['dropout']:g})"
            rows.append(row)
    return rows


def method_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on the method's own cost within a step, and on the ranks after the final event."""
    lines = []
    for record in records:
        where = f"{record['shape']}, checkpointing {'on' if record['checkpointing'] else 'off'}"
        if "method" in record:
            method = record["method"]
            parts = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in method["seconds"].items())
            lines.append(f"{where}: the method takes {method['share_of_step']:.2%} of the step: {parts}")
        if "kept_ranks" in record:
            kept = record["kept_ranks"]
            lines.append(f"{where}: ranks after the final event from {min(kept)} to {max(kept)}, {kept.count(0)} are 0")
    return lines
