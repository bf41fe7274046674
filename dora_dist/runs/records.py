"""A run's files other than weights: settings, measurements, and the components it kept."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.config.parse import config_text
from dora_dist.config.run import RunConfig
from dora_dist.console.files import append_line, each_line, read_json, read_lines, write_json, write_text
from dora_dist.console.provenance import versions
from dora_dist.method.prune_event import PruneEvent
from dora_dist.runs.fingerprint import Fingerprint

METRICS = "metrics.jsonl"
ALLOCATION = "allocation.jsonl"
ANSWERS = "answers.jsonl"
PLAN = "plan.json"
CONFIG = "config.yaml"
RUN = "run.json"
SUMMARY = "summary.json"
PAGE = "report.html"
IDENTITY = "cell.json"
FAILURE = "failure.json"
LOG = "log.txt"
BEST_STEP = "best_step"
"""Key of the line of ``metrics.jsonl`` that says which checkpoint's adapter a run has ended with."""
OF_CELL = (IDENTITY, FAILURE, LOG)
"""Files that a comparison writes into the folder of a cell before its run is there."""


@dataclass(frozen=True, kw_only=True)
class RecordedEvent:
    """A pruning event as a line of ``allocation.jsonl``.

    Attributes:
        step: optimizer step after which it took place.
        num_kept: number of components kept in the whole model.
        kept: layer -> indices of the components kept.
        returned: number of kept components that were pruned after the previous event.
        final: whether the mask is fixed from here on.
        num_parameters: total number of entries in the kept components' vectors, over the whole model; None in older
            records.
        scores: layer -> mean score of its components before the event, see :class:`PruneEvent`; None if nothing was
            scored, and in older records.
        planned: layer -> number of components in ``plan.json``, if they differ from those kept.
    """

    step: int
    num_kept: int
    kept: Mapping[str, list[int]]
    returned: int
    final: bool
    num_parameters: int | None = None
    scores: Mapping[str, float] | None = None
    planned: Mapping[str, int] | None = None

    @classmethod
    def of(cls, event: PruneEvent) -> "RecordedEvent":
        """The record of an event."""
        return cls(
            step=event.step,
            num_kept=event.num_kept,
            kept={name: mask.nonzero().flatten().tolist() for name, mask in event.kept.items()},
            returned=event.returned,
            final=event.final,
            num_parameters=event.num_parameters,
            scores=event.scores,
            planned=event.planned,
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> number of components kept."""
        return {name: len(indices) for name, indices in self.kept.items()}


class RunRecords:
    """Appends to a run's records; does nothing on ranks that do not write.

    Args:
        folder: the run's folder.
        writes: whether this process writes.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder = folder
        self.writes = writes
        self._events: list[str] = []
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        self._append(METRICS, json.dumps({"step": step, **values}))

    def answers(self, step: int, shown: Mapping[str, Sequence[Any]]) -> None:
        """Append generated answers to ``answers.jsonl``, one line each.

        Args:
            step: number of optimizer steps so far.
            shown: source -> dataclasses with ``number``, ``prompt``, ``reference`` and ``answer``.
        """
        for source, answers in shown.items():
            for answer in answers:
                self._append(ANSWERS, json.dumps({"step": step, "source": source, **asdict(answer)}))

    def event(self, event: PruneEvent) -> None:
        """Append a pruning event to ``allocation.jsonl``."""
        line = json.dumps(asdict(RecordedEvent.of(event)))
        self._events.append(line)
        self._append(ALLOCATION, line)

    def describe_run(
        self, config: RunConfig, fingerprint: Fingerprint, data: Any, world_size: int, unadapted: str | None = None
    ) -> None:
        """Write ``run.json`` and ``config.yaml``, when a run starts or resumes.

        Args:
            config: the run's configuration.
            fingerprint: the run's fingerprint.
            data: description of the data; plain JSON.
            world_size: number of ranks.
            unadapted: the modules that ``all-linear`` does not adapt, in words.
        """
        if self.writes:
            settings = fingerprint.as_dict()
            about = {
                "format": FORMAT_VERSION,
                "versions": versions(),
                "settings": settings,
                "data": data,
                "processes": world_size,
                "left_out": unadapted,
            }
            write_json(self.folder / RUN, about)
            write_text(self.folder / CONFIG, config_text(config))

    def save_events(self, checkpoint: Path) -> None:
        """Write all events so far to a checkpoint's folder, as ``allocation.jsonl``. Not copied from the run's own
        file, which may have been deleted or damaged during the run."""
        if self.writes:
            write_text(checkpoint / ALLOCATION, "".join(f"{line}\n" for line in self._events))

    def resume_from(self, checkpoint: Path, step: int) -> None:
        """Drop records after the checkpoint's step, and restore the events from the checkpoint: the run's own file may
        be damaged or missing, or the checkpoint may come from another run's folder. In that last case all records here
        are dropped, because they belong to another course."""
        own = checkpoint.resolve().parent == self.folder.resolve()
        self.truncate_after(step if own else -1)
        if self.writes:
            text = (checkpoint / ALLOCATION).read_text(encoding="utf-8")
            self._events = text.splitlines()
            write_text(self.folder / ALLOCATION, text)

    def forget_end(self) -> None:
        """Delete the summary of a run that continues, and the record of its failure: they are no longer valid."""
        if self.writes:
            for name in (SUMMARY, FAILURE):
                (self.folder / name).unlink(missing_ok=True)

    def truncate_after(self, step: int) -> None:
        """Drop records after ``step``, from which the run continues, and the line that names the best checkpoint."""
        if not self.writes:
            return
        for name in (METRICS, ALLOCATION, ANSWERS):
            path = self.folder / name
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= step and BEST_STEP not in line]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _append(self, name: str, line: str) -> None:
        if self.writes:
            append_line(self.folder / name, line)


def record_failure(
    folder: Path, error: str, *, step: int | None = None, stopped: bool = False, diverged: bool = False
) -> bool:
    """Record why a run ended without a result, unless that is recorded already: of several ranks, the first one counts.

    Args:
        folder: the run's folder.
        error: the message.
        step: the optimizer step that had begun, counted from 1; None if unknown.
        stopped: whether it was told to stop, rather than failed.
        diverged: whether a loss or an adapter that is not finite is the reason.

    Returns:
        Whether this call recorded it.
    """
    about = {"error": error, "step": step, "stopped": stopped, "diverged": diverged, "when": time.time()}
    try:
        with (folder / FAILURE).open("x", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=1) + "\n")
    except FileExistsError:
        return False
    return True


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The arguments of :func:`record_failure`, and ``when`` (seconds since the epoch); None if there is no record, or
    only the beginning of one."""
    try:
        failure: dict[str, Any] = read_json(folder / FAILURE)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return failure


def read_fingerprint(run: Path) -> Fingerprint:
    """The fingerprint that a run recorded.

    Raises:
        ValueError: a setting is missing.
    """
    return Fingerprint.from_dict(read_json(run / RUN)["settings"], run / RUN)


def each_metric(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``, one after the other; none before the first line is written."""
    path = run / METRICS
    if path.is_file():
        yield from each_line(path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's ``metrics.jsonl``."""
    return list(each_metric(run))


def read_answers(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``answers.jsonl``; empty if nothing was generated, and in older runs."""
    path = run / ANSWERS
    return read_lines(path) if path.is_file() else []


def read_events(path: Path) -> list[RecordedEvent]:
    """Pruning events in an ``allocation.jsonl``."""
    return [RecordedEvent(**line) for line in read_lines(path)] if path.exists() else []


def source_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Held-out sources that have figures of their own, in order."""
    return [name.removesuffix("_loss") for name in evaluation if name.endswith("_loss")]


def evaluation_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
