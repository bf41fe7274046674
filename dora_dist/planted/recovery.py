"""How well kept ranks recover planted ones, and statistics over seeds. Plain numbers."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from scipy import stats

CONFIDENCE = 0.95


def rank_correlation(kept: Mapping[str, int], planted: Mapping[str, int]) -> float | None:
    """Spearman's correlation over the layers, ties by their mean rank; None where either side is the same everywhere,
    for which it is not defined."""
    if len(set(kept.values())) < 2 or len(set(planted.values())) < 2:
        return None
    return float(stats.spearmanr([kept[name] for name in planted], list(planted.values())).statistic)


def budget_overlap(kept: Mapping[str, int], planted: Mapping[str, int]) -> float:
    """Share of the planted components for which their layer has kept one: ``sum min(kept, planted) / sum planted``."""
    return sum(min(kept[name], rank) for name, rank in planted.items()) / sum(planted.values())


def idle_share(kept: Mapping[str, int], planted: Mapping[str, int]) -> float:
    """Share of the kept components that lie in layers that need none."""
    return sum(kept[name] for name, rank in planted.items() if rank == 0) / sum(kept.values())


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard deviation of a sample (None for one value)."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> dict[str, float | None]:
    """Mean of ``value - reference`` over pairs, with a two-sided t interval of 95 % (None for one pair)."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    middle = mean(differences)
    if len(differences) < 2:
        return {"mean": middle, "low": None, "high": None}
    error = stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return {"mean": middle, "low": middle - half, "high": middle + half}
