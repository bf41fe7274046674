"""Statistics over seeds: spread, and differences of what was run with the same seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and spread of one method's values.

    Attributes:
        number: number of values.
        mean: their mean; None without any.
        deviation: sample standard deviation (divisor n - 1); None with fewer than two.
    """

    number: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of ``value - baseline`` over pairs, with Student's confidence interval and the p-value of the paired t test.

    Attributes:
        number: number of pairs.
        mean: mean difference; None without any pair.
        low: lower end of the interval of :data:`CONFIDENCE`; None with fewer than two pairs.
        high: its upper end; None likewise.
        p_value: two-sided; None with fewer than two pairs.
    """

    number: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    number = len(values)
    return Spread(
        number=number, mean=fmean(values) if number else None, deviation=stdev(values) if number > 1 else None
    )


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """The difference over pairs of values with the same place in both."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    number = len(differences)
    if number < 2:
        mean = differences[0] if number else None
        return PairedDifference(number=number, mean=mean, low=None, high=None, p_value=None)
    mean, error = fmean(differences), stdev(differences) / math.sqrt(number)
    half = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * error
    statistic = abs(mean) / error if error else (math.inf if mean else 0.0)
    p_value = 2 * float(t.sf(statistic, number - 1))
    return PairedDifference(number=number, mean=mean, low=mean - half, high=mean + half, p_value=p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class RateChoice:
    """The learning rate of a group of cells.

    Attributes:
        learning_rate: the rate that was chosen.
        means: learning rate -> mean figure on the search split; NaN where a run diverged.
        at_edge: ``lowest`` or ``highest`` where it is that of the grid, beyond which a better one may lie; else None.
        searched: whether there was anything to choose from.
    """

    learning_rate: float
    means: Mapping[float, float]
    at_edge: str | None
    searched: bool


def choose(figures: Mapping[float, Sequence[float]], lower_is_better: bool) -> RateChoice | None:
    """The rate with the best mean, the lowest of several equal ones; None where all rates have diverged.

    Args:
        figures: learning rate -> figures on the search split, one for each seed; NaN for a run that diverged, which
            rules its rate out.
        lower_is_better: whether a lower figure is better.
    """
    means = {rate: sum(values) / len(values) for rate, values in sorted(figures.items())}
    sane = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not sane:
        return None
    best = min(sane, key=lambda rate: (sane[rate] if lower_is_better else -sane[rate], rate))
    searched = len(means) > 1
    edge = {min(means): "lowest", max(means): "highest"}.get(best) if searched else None
    return RateChoice(learning_rate=best, means=means, at_edge=edge, searched=searched)
