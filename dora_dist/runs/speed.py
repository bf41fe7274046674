"""The speed of a run, given by the user or measured from the records of an earlier start, and the time that it took."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dora_dist.console.arguments import SPEED_OPTION
from dora_dist.console.files import read_json, read_lines
from dora_dist.runs.records import METRICS, RUN

LATEST_LINES = 50
"""Largest number of log lines that are used: an earlier start may have had other ranks, and the first steps are
slow."""


@dataclass(frozen=True)
class Speed:
    """The speed of a run.

    Attributes:
        tokens_per_second: tokens of all ranks together, without padding; the time includes evaluations and saves.
        origin: source of the figure, in words.
    """

    tokens_per_second: float
    origin: str


@dataclass
class TrainingTime:
    """Time of all logged training steps of a run, over all its sessions; evaluations and saves between them are in it.

    Attributes:
        seconds: time so far.
        tokens: number of tokens of all ranks in these steps, without padding; None where the lines do not say.
        step: the latest logged step.
    """

    seconds: float = 0.0
    tokens: float | None = 0.0
    step: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line of ``metrics.jsonl``, if it is one of training steps. The lines come in their order.

        A session that begins between two lines logs only the steps from there on: the steps before are taken to be as
        slow.
        """
        if "seconds_per_step" not in line:
            return
        seconds = line["seconds_per_step"] * (line["step"] - self.step)
        known = self.tokens is not None and "tokens_per_second" in line
        self.tokens = self.tokens + seconds * line["tokens_per_second"] if known else None
        self.seconds, self.step = self.seconds + seconds, line["step"]


def find_speed(run: Path, given: float | None) -> Speed | None:
    """The given speed, otherwise the one measured in the run's folder; None if there is neither.

    Args:
        run: the run's folder, which need not exist.
        given: tokens per second from the command line, or None.
    """
    return _seen(run) if given is None else Speed(given, SPEED_OPTION)


def _seen(run: Path) -> Speed | None:
    """The speed over the latest logged steps of a run, which may still be active."""
    if not ((run / METRICS).is_file() and (run / RUN).is_file()):
        return None
    lines = [line for line in read_lines(run / METRICS) if "seconds_per_step" in line]
    if not lines:
        return None
    about = read_json(run / RUN)
    per_pass = sum(source["per_epoch"] * source["tokens"] / source["examples"] for source in about["data"]["train"])
    spans = list(pairwise([{"step": 0, "epoch": 0.0}, *lines]))[-LATEST_LINES:]
    seconds = sum((line["step"] - before["step"]) * line["seconds_per_step"] for before, line in spans)
    passes = lines[-1]["epoch"] - spans[0][0]["epoch"]
    world_size = about["processes"]
    return Speed(passes * per_pass / seconds, f"seen in {run}, on {world_size} process{'es' * (world_size > 1)}")
