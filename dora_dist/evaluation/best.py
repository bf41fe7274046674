"""The best checkpoint of a run, by a held-out figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_dist.config.tasks import LOSS, lower_is_better


@dataclass(frozen=True, kw_only=True)
class BestRule:
    """Which checkpoint is the best, and when a run is ended early.

    Attributes:
        figure: name of a figure of evaluations, such as ``loss``, or ``SOURCE_loss`` of one of several sources.
        patience: number of evaluations in a row, none of them better, after which the run ends; None for never.
        steps: the steps whose evaluations count: from the final event on, those that are also saved, and the last one.
    """

    figure: str
    patience: int | None
    steps: frozenset[int]

    def is_better(self, value: float, other: float) -> bool:
        """Whether a figure is better than another; equal ones are not, nor is one that is not a number."""
        return value < other if lower_is_better(self.figure) else value > other


class BestCheckpoint:
    """Follows the evaluations of a run, the same on every rank, since all have the same figures.

    Args:
        rule: which evaluations count, and how.

    Attributes:
        step: step of the best evaluation so far; None before the first one whose figure is finite.
        value: its figure; None likewise.
        waited: number of evaluations since then that were no better.
    """

    def __init__(self, rule: BestRule) -> None:
        self.rule = rule
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0
        self._seen = 0

    def after_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Take note of an evaluation. One that does not count, or that was seen before, changes nothing."""
        if step not in self.rule.steps or step <= self._seen:
            return
        self._seen = step
        value = float(figures[self.rule.figure])
        if math.isfinite(value) and (self.value is None or self.rule.is_better(value, self.value)):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def has_waited_long_enough(self) -> bool:
        """Whether the run should end here."""
        return self.rule.patience is not None and self.waited >= self.rule.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        return {
            "figure": self.rule.figure,
            "step": self.step,
            "value": self.value,
            "waited": self.waited,
            "seen": self._seen,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's state. None, or that of another figure, says nothing about this one."""
        if state is not None and state["figure"] == self.rule.figure:
            self.step, self.value = state["step"], state["value"]
            self.waited, self._seen = state["waited"], state["seen"]


def figures_of(measured: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Names of the figures of an evaluation that a checkpoint can be the best by.

    Args:
        measured: names of the figures beside the loss.
        sources: names of the held-out sources.
    """
    overall = [LOSS, *measured]
    return [*overall, *(f"{name}_{figure}" for name in sources for figure in overall if len(sources) > 1)]
