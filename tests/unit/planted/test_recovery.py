"""Figures of recovery, against values by hand."""

import math

import pytest

from dora_dist.planted.recovery import (
    budget_overlap,
    idle_share,
    mean_and_deviation,
    paired_interval,
    rank_correlation,
)

PLANTED = {"a": 0, "b": 4, "c": 2, "d": 2}
KEPT = {"d": 1, "c": 0, "b": 5, "a": 2}


def test_overlap_counts_what_a_layer_needs_and_has():
    # min: a 0, b 4, c 0, d 1, of 8 planted.
    assert budget_overlap(KEPT, PLANTED) == 5 / 8
    assert budget_overlap(PLANTED, PLANTED) == 1
    assert budget_overlap({"a": 8, "b": 0, "c": 0, "d": 0}, PLANTED) == 0
    assert budget_overlap(dict.fromkeys(PLANTED, 2), PLANTED) == 6 / 8


def test_idle_share_is_that_of_the_kept():
    assert idle_share(KEPT, PLANTED) == 2 / 8
    assert idle_share(PLANTED, PLANTED) == 0


def test_correlation_of_ranks_with_ties():
    # Places of planted (a, b, c, d): 1, 4, 2.5, 2.5; of kept: 3, 4, 1, 2. Deviations from 2.5:
    # (-1.5, 1.5, 0, 0) and (0.5, 1.5, -1.5, -0.5): products sum to 1.5, squares to 4.5 and 5.
    assert rank_correlation(KEPT, PLANTED) == pytest.approx(1.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(PLANTED, PLANTED) == pytest.approx(1)
    # Monotone is enough.
    assert rank_correlation({name: rank**3 for name, rank in PLANTED.items()}, PLANTED) == pytest.approx(1)


def test_no_correlation_with_what_is_constant():
    assert rank_correlation(dict.fromkeys(PLANTED, 2), PLANTED) is None
    assert rank_correlation(KEPT, dict.fromkeys(PLANTED, 2)) is None


def test_paired_interval_by_hand():
    # Differences -1, -2, -3: mean -2, deviation 1, error 1 / sqrt(3); t quantile for 2 degrees of freedom 4.302653.
    found = paired_interval([1, 2, 3], [2, 4, 6])
    assert found["mean"] == -2
    assert found["low"] == pytest.approx(-2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found["high"] == pytest.approx(-2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert paired_interval([1], [3]) == {"mean": -2, "low": None, "high": None}


def test_mean_and_deviation_of_a_sample():
    assert mean_and_deviation([1.0, 3.0]) == {"mean": 2, "sd": pytest.approx(math.sqrt(2))}
    assert mean_and_deviation([5.0]) == {"mean": 5, "sd": None}
