"""Figures of recovery, against values by hand."""

import math

import pytest

from dora_dist.planted.recovery import budget_overlap, idle_share, rank_correlation

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
