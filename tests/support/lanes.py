"""Which tests run: the fast lane, which every change runs, or named parts of the full lane.

A test of the full lane has the mark ``full(PART)``. CONTRIBUTING.md says what each part covers, and when to run it.
"""

from dataclasses import dataclass

import pytest

PARTS = {
    "benchmark": "the benchmark and the experiment with planted ranks, as commands",
    "compare": "comparisons of methods, and AdaLoRA beside this project's runs",
    "data": "real instruction data of every kind",
    "docs": "the documents as a site, without a warning",
    "evaluate": "tasks of lm-eval-harness",
    "faults": "what breaks on a cluster: ranks that die, hang or fail, disks, signals, kills during a save",
    "install": "the wheel, the quickstart, and other launchers",
    "kernels": "kernels for GPUs, in Triton's interpreter",
    "memory": "the estimate of memory against the allocator",
    "models": "every architecture against stock PEFT, quantized and not",
    "pages": "the page of runs in a real browser, Debian's Chromium",
    "ranks": "other numbers of ranks, engines and batches: the same course",
    "served": "exports to GGUF in llama.cpp itself",
    "slurm": "the batch scripts on a cluster of two nodes",
    "tasks": "classification, question answering, summaries",
    "trackers": "Weights & Biases, MLflow and Trackio, offline, read back",
    "trl": "TRL's trainer with the callback, by the examples",
}
EVERYTHING = "all"
ORDER = ("e2e", "distributed", "gpu", "slurm", "unit")
"""Folders, the longest tests first, so that the short ones fill the gaps at the end."""


class UnknownPartError(ValueError):
    """The full lane has no part of this name."""


@dataclass(frozen=True)
class Lane:
    """The tests that are asked for.

    Args:
        parts: comma-separated names of parts of the full lane; empty for the fast lane; "all" for both lanes.
        named: whether files or folders were given, all of whose tests then run.

    Raises:
        UnknownPartError: a name is none of :data:`PARTS`.
    """

    parts: str
    named: bool

    def __post_init__(self) -> None:
        unknown = self.chosen - PARTS.keys() - {EVERYTHING}
        if unknown:
            raise UnknownPartError(f"the full lane has no part {sorted(unknown)}; it has {', '.join(PARTS)} and all")

    @property
    def chosen(self) -> set[str]:
        return {part.strip() for part in self.parts.split(",") if part.strip()}

    @property
    def is_fast(self) -> bool:
        """Whether tests of the full lane do not run."""
        return not self.chosen and not self.named

    def takes(self, part: str | None) -> bool:
        """Whether a test of ``part`` runs, or of the fast lane if that is None."""
        if EVERYTHING in self.chosen:
            return True
        if self.chosen:
            return part in self.chosen
        return part is None or not self.is_fast


def part_of(item: pytest.Item) -> str | None:
    """The part of the full lane that a test belongs to; None for the fast lane."""
    mark = item.get_closest_marker("full")
    if mark is None:
        return None
    (part,) = mark.args
    if part not in PARTS:
        raise UnknownPartError(f"{item.nodeid} is marked full({part!r}), which is no part")
    return part


def select(items: list[pytest.Item], lane: Lane) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Tests that run, in the order of :data:`ORDER`, and those that do not."""
    kept = [item for item in items if lane.takes(part_of(item))]
    dropped = [item for item in items if not lane.takes(part_of(item))]
    return sorted(kept, key=_folder), dropped


def _folder(item: pytest.Item) -> int:
    parts = item.path.parts
    return next((number for number, folder in enumerate(ORDER) if folder in parts), len(ORDER))
