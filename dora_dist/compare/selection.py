"""Choosing a learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The learning rate of a group of cells.

    Attributes:
        learning_rate: that was chosen.
        means: learning rate -> mean figure on the search split; NaN where a run diverged.
        at_edge: ``lowest`` or ``highest`` where it is that of the grid, beyond which a better one may lie; else None.
        searched: whether there was anything to choose from.
    """

    learning_rate: float
    means: Mapping[float, float]
    at_edge: str | None
    searched: bool


def choose(figures: Mapping[float, Sequence[float]], lower_is_better: bool) -> Choice | None:
    """The rate with the best mean, the lowest of several equal ones; None where all rates have diverged.

    Args:
        figures: learning rate -> figures on the search split, one for each seed; NaN for a run that diverged, which
            rules its rate out.
        lower_is_better: the sense of the figures.
    """
    means = {rate: sum(values) / len(values) for rate, values in sorted(figures.items())}
    sane = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not sane:
        return None
    best = min(sane, key=lambda rate: (sane[rate] if lower_is_better else -sane[rate], rate))
    searched = len(means) > 1
    edge = {min(means): "lowest", max(means): "highest"}.get(best) if searched else None
    return Choice(learning_rate=best, means=means, at_edge=edge, searched=searched)
