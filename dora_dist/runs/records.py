"""The files of a run other than weights: what it was, what it measured, which components it kept."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from dora_dist.method.prune_event import PruneEvent

METRICS = "metrics.jsonl"
ALLOCATION = "allocation.jsonl"
CONFIG = "config.yaml"
RUN = "run.json"
SUMMARY = "summary.json"

PACKAGES = ("dora-dist", "torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class RunRecords:
    """Appends to the records of a run; does nothing on ranks that do not write.

    Args:
        folder: of the run.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder = folder
        self.writes = writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        self._append(METRICS, {"step": step, **values})

    def event(self, event: PruneEvent) -> None:
        """Append a pruning event to ``allocation.jsonl``."""
        self._append(ALLOCATION, asdict(event))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file as a whole: a reader sees the old or the new one, never a part."""
        if self.writes:
            write_json(self.folder / name, content)

    def replace_events(self, events: Sequence[PruneEvent]) -> None:
        """Write ``allocation.jsonl`` anew, from the events that a checkpoint knows."""
        if self.writes:
            (self.folder / ALLOCATION).write_text(
                "".join(json.dumps(asdict(event)) + "\n" for event in events), encoding="utf-8"
            )

    def forget_end(self) -> None:
        """The run is going on: what was written when it had come to an end no longer holds."""
        if self.writes:
            (self.folder / SUMMARY).unlink(missing_ok=True)

    def truncate_after(self, step: int) -> None:
        """Forget what was recorded after ``step``: the run goes on from there."""
        if not self.writes:
            return
        for name in (METRICS, ALLOCATION):
            path = self.folder / name
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                temporary.replace(path)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self.writes:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL record. A last line that a killed run left half-written is not counted."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_events(path: Path) -> list[PruneEvent]:
    """Pruning events of an ``allocation.jsonl``."""
    return [PruneEvent(**line) for line in read_lines(path)] if path.exists() else []
