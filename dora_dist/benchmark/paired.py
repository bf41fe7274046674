"""Statistics of contestants measured in turns: only values of the same round are compared."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "lower_quartile": low, "upper_quartile": high}


def paired_ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratio to the reference in every round."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def paired_differences(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Difference from the reference in every round."""
    return [value - other for value, other in zip(values, reference, strict=True)]


def own_cost(values: Sequence[float], floor: Sequence[float], reference: Sequence[float]) -> float:
    """An adapter's cost beyond the frozen base, relative to the reference adapter's: ``(x - a) / (b - a)``, from the
    medians of paired differences. NaN if the reference costs nothing."""
    cost = median(paired_differences(reference, floor))
    return median(paired_differences(values, floor)) / cost if cost else float("nan")


def adapter_share(values: Sequence[float], floor: Sequence[float]) -> dict[str, float]:
    """The part of a step beyond the frozen base, ``(x - a) / x``, over the rounds."""
    return spread([(value - base) / value for value, base in zip(values, floor, strict=True)])


def turns(names: Sequence[str], round_number: int) -> list[str]:
    """Order of the contestants in a round: each starts in turn, and every second round is reversed, so that no
    contestant always follows the same neighbour."""
    start = round_number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if round_number % 2 else order


def summarize(
    seconds: Mapping[str, Sequence[float]], floor: str, reference: str, tokens: int
) -> dict[str, dict[str, Any]]:
    """Figures of every contestant; ratios to the reference and to the floor if these were measured."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        time = spread(own)
        found[name] = {"seconds": time, "tokens_per_second": tokens / time["median"]}
        if reference in seconds:
            found[name]["time_ratio"] = spread(paired_ratios(own, seconds[reference]))
        if floor in seconds:
            found[name]["to_floor"] = spread(paired_ratios(own, seconds[floor]))
        if floor in seconds and reference in seconds:
            found[name]["own_cost"] = own_cost(own, seconds[floor], seconds[reference])
    return found
