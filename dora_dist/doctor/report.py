"""Formats the report as text, section by section."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dora_dist.console.text import aligned, duration, format_bytes, ranges, rate
from dora_dist.doctor.facts import Gpu, NetworkFacts, Problem, RankFacts, StorageFacts
from dora_dist.doctor.grouping import by_node
from dora_dist.doctor.shared_findings import bus_bandwidth

WIDTH = 110
FIRST = ("torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes", "datasets")
"""Distributions whose versions are shown; all required ones are checked."""


def section(title: str, lines: Sequence[str]) -> str:
    """A title and its indented lines, followed by an empty line."""
    return "\n".join([title, *(f"  {line}" for text in lines for line in text.splitlines()), ""])


def software_section(ranks: Sequence[RankFacts]) -> str:
    """Versions on rank 0, and whether other ranks have the same."""
    first = ranks[0]
    cuda = "build for CPUs" if first.cuda is None else f"CUDA {first.cuda}"
    shown = [
        f"python {first.python}",
        f"dora-dist {first.versions.get('dora-dist') or 'not installed'} (source {first.source})",
        *(f"{name} {first.versions.get(name) or 'not installed'}" for name in FIRST),
    ]
    same = "the same on all ranks" if len({_versions(facts) for facts in ranks}) == 1 else "of rank 0; others differ"
    title = "Software" if len(ranks) == 1 else f"Software, {same}"
    return section(title, [*textwrap.wrap(", ".join(shown), WIDTH - 2), f"torch: {cuda}"])


def _versions(facts: RankFacts) -> tuple[object, ...]:
    return facts.python, facts.source, facts.cuda, tuple(sorted(facts.versions.items(), key=str))


def nodes_section(ranks: Sequence[RankFacts]) -> str:
    """Table with one row per node."""
    rows = [("node", "ranks", "driver", "cores", "threads", "memory", "/dev/shm free", "open files", "clock")]
    for node, group in by_node(ranks).items():
        first = group[0]
        rows.append(
            (
                node,
                ranges([facts.rank for facts in group]),
                first.driver or "none",
                str(len({core for facts in group for core in facts.cores})),
                str(sum(facts.threads for facts in group)),
                format_bytes(first.memory),
                "missing" if first.shm is None else format_bytes(first.shm),
                "unlimited" if first.open_files < 0 else str(first.open_files),
                f"{first.clock - ranks[0].clock:+.1f} s",
            )
        )
    plural = "s" * (len(rows) > 2)
    return section(f"{len(rows) - 1} node{plural}, {len(ranks)} rank{'s' * (len(ranks) > 1)}", [aligned(rows, 3)])


def environment_section(ranks: Sequence[RankFacts]) -> str:
    """Variables that decide how ranks find each other. If a variable differs, each value is shown with its ranks."""
    lines = []
    for name in dict.fromkeys(name for facts in ranks for name in facts.environment):
        values = grouped(ranks, partial(_value, name))
        lines += textwrap.wrap(f"{name}={values}", WIDTH - 2, subsequent_indent="    ")
    return section("Environment", lines or ["none of the variables that launchers, NCCL and gloo read is set"])


def _value(name: str, facts: RankFacts) -> str:
    return facts.environment.get(name, "not set")


def grouped(ranks: Sequence[RankFacts], value: Callable[[RankFacts], str]) -> str:
    """A value that is the same everywhere, or each value with its ranks: ``a (ranks 0-3), b (rank 4)``."""
    groups: dict[str, list[int]] = {}
    for facts in ranks:
        groups.setdefault(value(facts), []).append(facts.rank)
    if len(groups) == 1:
        return next(iter(groups))
    named = ((text, f"rank{'s' * (len(numbers) > 1)} {ranges(numbers)}") for text, numbers in groups.items())
    return ", ".join(f"{text} ({where})" for text, where in named)


def devices_section(ranks: Sequence[RankFacts]) -> str:
    """GPUs, one row for each kind on a node, and the results of arithmetic on every rank's device."""
    lines = _gpu_table(ranks) or ["no GPU: training computes on CPUs, in float32 unless configured otherwise"]
    for name in dict.fromkeys(check.name for facts in ranks for check in facts.checks):
        lines.append(f"{name}: {grouped(ranks, partial(_outcome, name))}")
    return section("Devices", lines)


def _gpu_table(ranks: Sequence[RankFacts]) -> list[str]:
    kinds: dict[tuple[str, str], list[tuple[int, Gpu]]] = {}
    for facts in ranks:
        for gpu in facts.gpus:
            kinds.setdefault((facts.node, gpu.name), []).append((facts.rank, gpu))
    rows = [("node", "GPUs", "ranks", "capability", "memory", "least free", "bfloat16")]
    for (node, name), users in kinds.items():
        numbers, gpus = zip(*users, strict=True)
        rows.append(
            (
                node,
                f"{len(gpus)} x {name}",
                ranges(sorted(set(numbers))),
                gpus[0].capability,
                format_bytes(gpus[0].total),
                format_bytes(min(gpu.free for gpu in gpus)),
                "native" if gpus[0].native_bf16 else "no",
            )
        )
    return [aligned(rows, 3)] if kinds else []


def _outcome(name: str, facts: RankFacts) -> str:
    checks = [check for check in facts.checks if check.name == name]
    return "wrong" if any(check.failure for check in checks) else next((check.detail for check in checks), "not tried")


def storage_section(storage: Sequence[StorageFacts], folder: Path, checkpoint: int | None) -> str:
    """One row per node, with the figures of the rank that measured.

    Args:
        storage: facts of all ranks, by rank.
        folder: the checkpoint folder, ``output_dir``.
        checkpoint: bytes of one checkpoint of the configured run, if known.
    """
    rows = [("node", "file system", "seen by", "free", "free inodes", "write", "read")]
    for node in dict.fromkeys(facts.node for facts in storage):
        group = [facts for facts in storage if facts.node == node]
        first = next((facts for facts in group if facts.write is not None), group[0])
        rows.append(
            (
                node,
                first.filesystem or "?",
                f"{sum(facts.sees for facts in group)} of {len(group)}",
                "?" if first.free is None else format_bytes(first.free),
                "?" if first.free_inodes is None else f"{first.free_inodes:,}",
                "-" if first.write is None else rate(first.write),
                "-" if first.read is None else rate(first.read),
            )
        )
    lines = [aligned(rows, 2)]
    if checkpoint is not None:
        speed = storage[0].write
        took = f", {duration(checkpoint / speed)} to write" if speed else ""
        lines.append(f"a checkpoint of this run takes about {format_bytes(checkpoint)}{took}")
    return section(f"Checkpoint folder {folder}", lines)


def network_section(network: NetworkFacts | None, ranks: int) -> str:
    """Times and bandwidths of all-reduces."""
    if network is None:
        return section("All-reduce", ["not tried: one process without a launcher"])
    rows = [("size", "time", "algorithm bandwidth", "bus bandwidth")]
    for size, seconds in network.seconds.items():
        rows.append(
            (format_bytes(size), duration(seconds), rate(size / seconds), rate(bus_bandwidth(size, seconds, ranks)))
        )
    lines = ["failed, see below"] if network.failures else ["the sum of known values is right"]
    if len(rows) > 1:
        lines.append(aligned(rows, 0))
    return section(f"All-reduce over {ranks} rank{'s' * (ranks > 1)}, {network.backend}", lines)


def problems_section(problems: Sequence[Problem]) -> str:
    """The last section: all problems with rule and action."""
    if not problems:
        return "nothing wrong found"
    lines = [f"{len(problems)} problem{'s' * (len(problems) > 1)}"]
    for number, problem in enumerate(problems, start=1):
        lines += _wrapped(f"{number:3}. {problem.where}: ", problem.found)
        lines += _wrapped("       rule: ", problem.rule)
        lines += _wrapped("       do:   ", problem.action)
    return "\n".join(lines)


def _wrapped(begin: str, text: str) -> list[str]:
    return textwrap.wrap(begin + text, WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False, drop_whitespace=True)
