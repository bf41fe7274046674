"""Measures how well kept ranks recover planted ones. Plain numbers."""

from collections.abc import Mapping

from scipy import stats


def rank_correlation(kept: Mapping[str, int], planted: Mapping[str, int]) -> float | None:
    """Spearman's correlation over the layers, with mean ranks for ties; None if either side is constant, for which it
    is undefined."""
    if len(set(kept.values())) < 2 or len(set(planted.values())) < 2:
        return None
    return float(stats.spearmanr([kept[name] for name in planted], list(planted.values())).statistic)


def budget_overlap(kept: Mapping[str, int], planted: Mapping[str, int]) -> float:
    """Share of the planted components that their layer has kept: ``sum min(kept, planted) / sum planted``."""
    return sum(min(kept[name], rank) for name, rank in planted.items()) / sum(planted.values())


def idle_share(kept: Mapping[str, int], planted: Mapping[str, int]) -> float:
    """Share of the kept components that are in layers without planted components."""
    return sum(kept[name] for name, rank in planted.items() if rank == 0) / sum(kept.values())
