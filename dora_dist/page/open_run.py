"""The records of a run, read for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.runs import claim, records
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.pictures import Budget
from dora_dist.runs.summary import budget_of, is_finished, summarize

ENDED, GOING_ON, NOT_ENDED = "ended", "is going on", "has not ended, and nothing is writing into its folder"


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """What a page is made of.

    Attributes:
        name: by which its curves and maps are told from those of other runs on the page.
        folder: of the run.
        state: one of :data:`ENDED`, :data:`GOING_ON`, :data:`NOT_ENDED`.
        summary: see :func:`~dora_dist.runs.summary.summarize`.
        fingerprint: its settings.
        budget: components over the steps.
        lines: of ``metrics.jsonl``.
        events: of ``allocation.jsonl``.
        answers: of ``answers.jsonl``.
    """

    name: str
    folder: Path
    state: str
    summary: Mapping[str, Any]
    fingerprint: Fingerprint
    budget: Budget
    lines: Sequence[Mapping[str, Any]]
    events: Sequence[records.RecordedEvent]
    answers: Sequence[Mapping[str, Any]]


def open_runs(folders: Sequence[Path]) -> list[OpenRun]:
    """Read the records of runs.

    Args:
        folders: of the runs, in the order in which they are shown.

    Raises:
        ValueError: one of them is not the folder of a run, or is there twice.
    """
    for number, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:number]}:
            raise ValueError(f"the run {folder} is given twice: a page shows a run once, leave one of them out")
    return [_open(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
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
        state=ENDED if is_finished(folder) else GOING_ON if claim.is_held(folder) else NOT_ENDED,
        summary=summary,
        fingerprint=records.read_fingerprint(folder),
        budget=budget_of(folder, summary),
        lines=records.read_metrics(folder),
        events=records.read_events(folder / records.ALLOCATION),
        answers=records.read_answers(folder),
    )
