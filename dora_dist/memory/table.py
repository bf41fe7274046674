"""The table that ``estimate`` prints."""

from collections.abc import Sequence

from dora_dist.console.text import GIB, format_bytes
from dora_dist.memory.estimate import MemoryEstimate
from dora_dist.memory.step import StepMemory

CONTEXT_BYTES = GIB
"""Left for what the allocator does not count: CUDA's context, its libraries, NCCL's buffers."""
GPU_SIZES = (16, 24, 40, 48, 80, 96, 141, 192)
"""Memory of common GPUs, in GiB."""
MARKS = (" *", " <")
"""Ends of cells: the configured column, and the peak of a column."""


def render(estimate: MemoryEstimate) -> str:
    """The estimate as a table for a person."""
    columns = (estimate.without, estimate.with_checkpointing)
    step = estimate.configured
    gpu = "GPU" if estimate.device == "cuda" else "process"
    plural = "" if estimate.world_size == 1 else "s" if gpu == "GPU" else "es"
    lines = [
        f"Memory per {gpu}: {estimate.model}",
        f"  {estimate.quantization} base, {estimate.compute_dtype} activations, {estimate.adapter_dtype} adapter, "
        f"engine {estimate.engine} on {estimate.world_size} {gpu}{plural}",
        f"  at most {estimate.tokens_per_micro_batch:,} tokens per micro-batch ({estimate.rows} x {estimate.length:,}) "
        f"and {estimate.tokens_per_step:,} per optimizer step "
        f"(x {estimate.accumulation} accumulated x {estimate.world_size} {gpu}{plural})",
        *([f"  {estimate.left_out}"] if estimate.left_out else []),
        "",
        _row("gradient checkpointing", *(("off", "on *") if estimate.checkpointing else ("off *", "on"))),
    ]
    peaks = [column.peak.parts for column in columns]
    names = [name for name in dict.fromkeys([*peaks[0], *peaks[1]]) if any(peak.get(name) for peak in peaks)]
    lines += [_row(f"  {name}", *(format_bytes(peak.get(name, 0)) for peak in peaks)) for name in names]
    lines += [
        "  " + "-" * 62,
        _row("peak", *(format_bytes(column.peak.total) for column in columns)),
        "",
        _row(
            "activations kept, a guess" if step.approximate else "activations kept for the backward",
            format_bytes(step.activations),
            format_bytes(step.checkpointed_activations),
        ),
        _row("  and of the layer recomputed", "", format_bytes(step.recomputed)),
        "",
        "  memory at",
    ]
    for first, second in zip(estimate.without.moments, estimate.with_checkpointing.moments, strict=True):
        cells = [
            format_bytes(moment.total) + (" <" if moment is column.peak else "")
            for moment, column in zip((first, second), columns, strict=True)
        ]
        lines.append(_row(f"  {second.name}", *cells))
    lines += ["", *_fits(columns)] if estimate.device == "cuda" else []
    lines += ["", *_shard_lines(estimate)] if estimate.shards else []
    lines += ["", "* as configured;  < the peak.  " + _largest(estimate)]
    if step.approximate:
        lines.append("Activations are a guess: the decoder layers of this architecture are built unlike Llama's.")
    return "\n".join(lines)


def _row(title: str, *cells: str) -> str:
    """A line of the table; a cell may end in a mark, which stands outside its column."""
    padded = (cell if cell.endswith(MARKS) else f"{cell}  " for cell in cells)
    return f"  {title:<36}{''.join(f'{cell:>14}' for cell in padded)}".rstrip()


def _fits(columns: Sequence[StepMemory]) -> list[str]:
    lines = [f"  fits (with {format_bytes(CONTEXT_BYTES)} left for CUDA and NCCL, and no fragmentation)"]
    for size in GPU_SIZES:
        cells = ["yes" if column.peak.total + CONTEXT_BYTES <= size * GIB else "no" for column in columns]
        lines.append(_row(f"  {size} GB", *cells))
    return lines


def _shard_lines(estimate: MemoryEstimate) -> list[str]:
    sizes = "".join(f"{size:>10}" for size in estimate.shards)
    shards = "".join(f"{format_bytes(bytes_):>10}" for bytes_ in estimate.shards.values())
    return [f"  {'number of GPUs':<20}{sizes}", f"  {'ZeRO-2 shard on each':<20}{shards}"]


def _largest(estimate: MemoryEstimate) -> str:
    parts = estimate.configured.peak.parts
    largest = sorted(parts, key=lambda name: parts[name], reverse=True)[:2]
    shares = " and ".join(f"{name} ({parts[name] / estimate.peak_bytes:.0%})" for name in largest)
    return f"The most is in {shares}."
