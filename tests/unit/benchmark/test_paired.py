"""Statistics of the benchmark, on invented times."""

import math
from itertools import pairwise

import pytest

from dora_dist.benchmark.paired import adapter_share, own_cost, paired_ratios, spread, summarize, turns

FLOOR = [8.0, 16.0, 80.0]
LORA = [10.0, 20.0, 100.0]
OURS = [9.0, 18.0, 90.0]


def test_ratios_are_of_the_same_round():
    # The machine became ten times slower: ratios do not notice.
    assert paired_ratios(OURS, LORA) == pytest.approx([0.9, 0.9, 0.9])


def test_own_cost_is_measured_from_the_floor():
    assert own_cost(OURS, FLOOR, LORA) == pytest.approx(0.5)
    assert own_cost(LORA, FLOOR, LORA) == 1
    assert own_cost(FLOOR, FLOOR, LORA) == 0
    assert math.isnan(own_cost(OURS, LORA, LORA))


def test_the_adapters_share():
    assert adapter_share(LORA, FLOOR)["median"] == pytest.approx(0.2)


def test_median_and_quartiles():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "lower_quartile": 2, "upper_quartile": 4}
    assert spread([7.0]) == {"median": 7, "lower_quartile": 7, "upper_quartile": 7}


def test_a_summary_has_ratios_only_to_what_was_measured():
    found = summarize({"lora": LORA, "ours": OURS}, "floor", "lora", tokens=180)
    assert found["ours"]["tokens_per_second"] == 10
    assert found["ours"]["time_ratio"]["median"] == pytest.approx(0.9)
    assert "own_cost" not in found["ours"]
    assert "to_floor" not in found["ours"]


def test_everyone_has_every_place_and_every_neighbour():
    names = ["a", "b", "c", "d", "e"]
    rounds = [turns(names, number) for number in range(10)]
    assert all(sorted(order) == names for order in rounds)
    for place in range(5):
        assert {order[place] for order in rounds} == set(names)
    before = {(one, other) for order in rounds for one, other in pairwise(order)}
    assert ("a", "b") in before
    assert ("b", "a") in before
