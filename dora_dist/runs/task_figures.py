"""What base and adapter of a run have reached on tasks of lm-eval-harness: ``evaluations.jsonl``, and its table."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_dist.config.format_version import ADAPTER_WEIGHTS
from dora_dist.console.files import append_line, read_lines
from dora_dist.console.text import aligned

EVALUATIONS = "evaluations.jsonl"
SAME_MEAN = 1e-6
"""Largest difference between the mean over examples and a reported figure that is taken for this mean."""


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """One figure of one task.

    Attributes:
        task: name of the task or of a group of tasks.
        metric: name of the metric, such as ``acc``; with the filter's name after a colon, where there is one.
        examples: number of examples answered; None for a group.
        base: the base's figure.
        adapter: the figure of the base with the adapter.
        base_error: standard error of ``base``; None where the harness gives none.
        adapter_error: standard error of ``adapter``; None likewise.
        difference_error: standard error of ``adapter - base``, over the same examples; None where the figure is no mean
            over examples.
    """

    task: str
    metric: str
    examples: int | None
    base: float
    adapter: float
    base_error: float | None
    adapter_error: float | None
    difference_error: float | None

    @property
    def difference(self) -> float:
        """The adapter's figure minus the base's."""
        return self.adapter - self.base


def paired_error(
    base: Mapping[int, float], adapter: Mapping[int, float], base_mean: float, adapter_mean: float
) -> float | None:
    """Standard error of the mean difference over examples, each of which both have answered.

    Args:
        base: number of an example -> the base's figure.
        adapter: number of an example -> the adapter's figure.
        base_mean: the base's reported figure.
        adapter_mean: the adapter's reported figure.

    Returns:
        The standard error; None where the reported figures are not the means, there is one example only, or the
        examples are not the same.
    """
    count = len(base)
    if base.keys() != adapter.keys() or count < 2:
        return None
    for values, reported in ((base, base_mean), (adapter, adapter_mean)):
        if not abs(math.fsum(values.values()) / count - reported) <= SAME_MEAN * max(1.0, abs(reported)):
            return None
    differences = [adapter[number] - base[number] for number in base]
    mean = math.fsum(differences) / count
    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    return math.sqrt(variance / count)


def table_of(figures: Sequence[TaskFigure]) -> str:
    """Base, adapter and their difference, each with its standard error where it has one."""
    rows = [
        (
            figure.task,
            figure.metric,
            "" if figure.examples is None else f"{figure.examples:,}",
            _with_error(figure.base, figure.base_error),
            _with_error(figure.adapter, figure.adapter_error),
            _with_error(figure.difference, figure.difference_error, sign="+"),
        )
        for figure in figures
    ]
    return aligned([("task", "metric", "examples", "base", "adapter", "difference"), *rows], num_words=2)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def line_of(adapter: str, figures: Sequence[TaskFigure], about: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as a line of ``evaluations.jsonl``.

    Args:
        adapter: name of the adapter's folder: in a run, ``adapter`` or a checkpoint.
        figures: the figures of all tasks.
        about: settings and provenance; plain JSON.
    """
    return {"adapter": adapter, "figures": [asdict(figure) for figure in figures], **about}


def record_line(run: Path, line: Mapping[str, Any]) -> None:
    """Append a line of :func:`line_of` to ``evaluations.jsonl`` of a run."""
    append_line(run / EVALUATIONS, json.dumps(line, ensure_ascii=False))


def digest_of(adapter: Path) -> str | None:
    """SHA-256 of the weights in an adapter's folder; None where there are none."""
    path = adapter / ADAPTER_WEIGHTS
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_figures(run: Path, adapter: str = "adapter") -> list[TaskFigure]:
    """The latest figures of an adapter, one for each task and metric; none where nothing was evaluated.

    Figures of earlier weights of the adapter's folder, such as those before a run went on, are left out. Lines of
    versions that recorded no digest are taken.
    """
    path = run / EVALUATIONS
    found: dict[tuple[str, str], TaskFigure] = {}
    if not path.is_file():
        return []
    digest = digest_of(run / adapter)
    for line in read_lines(path):
        if line["adapter"] == adapter and line.get("adapter_sha256", digest) == digest:
            for entry in line["figures"]:
                figure = TaskFigure(**entry)
                found[figure.task, figure.metric] = figure
    return list(found.values())
