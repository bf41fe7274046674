"""Against figures worked out by hand, and scipy's own tests."""

import math

import pytest
from scipy import stats

from dora_dist.evaluation.seeds import holm, paired_difference, spread


def test_spread_divides_by_one_less():
    found = spread([1.0, 2.0, 6.0])
    assert (found.number, found.mean) == (3, 3.0)
    assert found.deviation == pytest.approx(math.sqrt(7.0))


def test_one_value_has_no_deviation_and_none_no_mean():
    assert (spread([4.0]).mean, spread([4.0]).deviation) == (4.0, None)
    assert (spread([]).mean, spread([]).deviation) == (None, None)


def test_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's 97.5 % point with 2 degrees of freedom 4.3027
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)


def test_paired_difference_is_scipys_paired_test():
    values, baseline = [0.91, 0.93, 0.90, 0.97, 0.89], [0.95, 0.94, 0.93, 0.95, 0.92]
    found, expected = paired_difference(values, baseline), stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_pairing_removes_what_seeds_have_in_common():
    seeds = [0.0, 10.0, 20.0, 30.0]
    found = paired_difference([seed + 1 + 0.01 * seed for seed in seeds], seeds)
    assert found.low > 0.9
    assert found.high < 1.5


def test_one_pair_has_no_interval():
    found = paired_difference([2.0], [1.5])
    assert (found.number, found.mean, found.low, found.high, found.p_value) == (1, 0.5, None, None, None)


def test_no_pair_has_no_difference():
    assert paired_difference([], []).mean is None


def test_differences_that_are_all_the_same():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p_value == 0.0


def test_holm_by_hand():
    # ascending 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1; never below what came before
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
