"""Reads a run's records for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.runs import records
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.pictures import BudgetCurve
from dora_dist.runs.summary import RunState, budget_of, state_of, summarize


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """The data of one run on a page.

    Attributes:
        name: name that distinguishes its curves and maps from those of other runs on the page.
        folder: the run's folder.
        state: whether it is running, has ended or has failed.
        summary: the run's :func:`~dora_dist.runs.summary.summarize`.
        fingerprint: the run's settings.
        budget: number of components over the steps.
        lines: lines of ``metrics.jsonl``.
        events: lines of ``allocation.jsonl``.
        answers: lines of ``answers.jsonl``.
    """

    name: str
    folder: Path
    state: RunState
    summary: Mapping[str, Any]
    fingerprint: Fingerprint
    budget: BudgetCurve
    lines: Sequence[Mapping[str, Any]]
    events: Sequence[records.RecordedEvent]
    answers: Sequence[Mapping[str, Any]]


def open_runs(folders: Sequence[Path]) -> list[OpenRun]:
    """Read the records of runs.

    Args:
        folders: folders of the runs, in display order.

    Raises:
        ValueError: a folder is not a run's folder, or is given twice.
    """
    for number, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:number]}:
            raise ValueError(f"the run {folder} is given twice, but a page shows a run once: remove one of them")
    return [_open(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest last parts of the paths that are all different."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _open(folder: Path, name: str) -> OpenRun:
    summary = summarize(folder)
    return OpenRun(
        name=name,
        folder=folder,
        state=state_of(folder, summary),
        summary=summary,
        fingerprint=records.read_fingerprint(folder),
        budget=budget_of(folder, summary),
        lines=records.read_metrics(folder),
        events=records.read_events(folder / records.ALLOCATION),
        answers=records.read_answers(folder),
    )
