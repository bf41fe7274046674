"""The table that ``estimate`` prints."""

from itertools import chain

from dora_dist.base_model.recomputation import Recomputation
from dora_dist.console.text import GIB, format_bytes
from dora_dist.memory.estimate import MemoryEstimate
from dora_dist.memory.step import StepMemory

CONTEXT_BYTES = GIB
"""Reserve for memory that the allocator does not count: CUDA's context, its libraries, NCCL's buffers."""
MARKS = (" *", " <")
"""Ends of cells: the configured column, and the peak of a column."""


def render(estimate: MemoryEstimate) -> str:
    """The estimate as a table to read."""
    columns = _columns(estimate)
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
        _row("recomputed layers", *columns),
    ]
    steps = list(columns.values())
    peaks = [each.peak.parts for each in steps]
    names = [name for name in dict.fromkeys(chain(*peaks)) if any(peak.get(name) for peak in peaks)]
    lines += [_row(f"  {name}", *(format_bytes(peak.get(name, 0)) for peak in peaks)) for name in names]
    lines += [
        "  " + "-" * 62,
        _row("peak", *(format_bytes(each.peak.total) for each in steps)),
        "",
        _row(
            "activations kept, a guess" if step.approximate else "activations kept for the backward",
            *(format_bytes(each.activations) for each in steps),
        ),
        _row(
            "  and of the layer recomputed",
            *(format_bytes(each.recomputed) if each.recomputed else "" for each in steps),
        ),
        "",
        "  memory at",
    ]
    backward = dict.fromkeys(instant.name for each in steps for instant in each.instants[:-1])
    for name in (*backward, step.instants[-1].name):
        lines.append(_row(f"  {name}", *(_at(each, name) for each in steps)))
    lines += ["", *_fits(estimate)] if estimate.device == "cuda" else []
    lines += ["", *_shard_lines(estimate)] if estimate.shards else []
    lines += ["", "* as configured;  < the peak.  " + _largest(estimate)]
    if step.approximate:
        lines.append(
            "Activations are a guess: the decoder layers are routed (adapter.routing), or built unlike Llama's."
        )
    return "\n".join(lines)


def _row(title: str, *cells: str) -> str:
    """A line of the table; a cell may end in a mark, which stands outside its column."""
    padded = (cell if cell.endswith(MARKS) else f"{cell}  " for cell in cells)
    return f"  {title:<36}{''.join(f'{cell:>14}' for cell in padded)}".rstrip()


def _columns(estimate: MemoryEstimate) -> dict[str, StepMemory]:
    """Title -> memory if no layer is recomputed, if as many are as configured, and if all are."""
    count, number = estimate.recomputation.count, estimate.recomputation.layers
    between = {f"{estimate.recomputation} *": estimate.configured} if 0 < count < number else {}
    return {
        "none" + " *" * (count == 0): estimate.recomputing_none,
        **between,
        "all" + " *" * (0 < count == number): estimate.recomputing_all,
    }


def _at(step: StepMemory, name: str) -> str:
    """A cell with the memory at the instant of this name; empty if there is no such instant."""
    found = [instant for instant in step.instants if instant.name == name]
    return format_bytes(found[0].total) + " <" * (found[0] is step.peak) if found else ""


def _fits(estimate: MemoryEstimate) -> list[str]:
    columns = _columns(estimate)
    lines = [
        f"  fits (with {format_bytes(CONTEXT_BYTES)} left for CUDA and NCCL, no fragmentation); on the right what "
        "recompute_layers: auto recomputes"
    ]
    for size, count in estimate.auto.items():
        cells = ["yes" if step.peak.total + CONTEXT_BYTES <= size * GIB else "no" for step in columns.values()]
        auto = "too large" if count is None else str(Recomputation(count, estimate.recomputation.layers))
        lines.append(_row(f"  {size} GB", *cells, auto))
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
