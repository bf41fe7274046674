import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.data.mixture import cap_examples, example_order, hold_back, pass_counts

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def members_of(sizes):
    first = np.cumsum([0, *sizes])
    return [np.arange(start, start + size) for start, size in zip(first, sizes, strict=False)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [800, 100, 100]),
        ({"weights": [1, 1, 2]}, [250, 250, 500]),
        ({"epochs": [0.5, 1, 3]}, [400, 100, 300]),
        ({"temperature": 1.0}, [800, 100, 100]),
        ({"temperature": 1e9}, [334, 333, 333]),
        # 800 ** 0.5 : 100 ** 0.5 : 100 ** 0.5
        ({"temperature": 2.0}, [586, 207, 207]),
    ],
)
def test_examples_of_each_source_in_a_pass(options, expected):
    assert pass_counts([800, 100, 100], **options) == expected


@settings(max_examples=80, deadline=None)
@given(SIZES, st.data())
def test_shares_are_met_to_within_one_example(sizes, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    counts = pass_counts(sizes, weights=weights)
    for count, weight in zip(counts, weights, strict=True):
        assert count == max(1, count)
        assert abs(count - weight / sum(weights) * sum(sizes)) <= 1


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(0, 2**31 - 1), st.data())
def test_every_pass_has_its_counts_and_every_source_goes_round_completely(sizes, seed, data):
    counts = [data.draw(st.integers(1, 2 * size)) for size in sizes]
    members = members_of(sizes)
    order = example_order(members, counts, 3 * sum(counts), seed)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for start in range(0, len(order), sum(counts)):
        part = order[start : start + sum(counts)]
        assert np.bincount(owner[part], minlength=len(sizes)).tolist() == counts
    for source, size in enumerate(sizes):
        mine = order[owner[order] == source]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == members[source].tolist()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**31 - 1), st.integers(1, 300), st.integers(1, 300))
def test_a_longer_order_begins_with_every_shorter_one(sizes, seed, length, more):
    np.random.seed(1)
    short = example_order(members_of(sizes), sizes, length, seed)
    np.random.seed(2)
    longer = example_order(members_of(sizes), sizes, length + more, seed)
    assert len(short) == length
    assert longer[:length].tolist() == short.tolist()


def test_seeds_passes_and_sources_differ():
    members = members_of([100, 100])
    orders = [example_order(members, [100, 100], 400, seed) for seed in (0, 1)]
    parts = [part.tolist() for order in orders for part in (order[:200], order[200:])]
    parts += [(part[part < 100]).tolist() for order in orders for part in (order[:200], order[200:])]
    parts += [(part[part >= 100] - 100).tolist() for order in orders for part in (order[:200], order[200:])]
    assert len({tuple(part) for part in parts}) == len(parts)


def test_a_cap_takes_a_random_part_of_a_source():
    kept = cap_examples(1000, 100, seed=3, source=0)
    assert len(set(kept)) == 100
    assert kept.tolist() == sorted(kept)
    assert kept.max() > 900, "the first ones only would be another thing"
    assert kept.tolist() != cap_examples(1000, 100, seed=4, source=0).tolist()
    assert cap_examples(50, 100, 0, 0).tolist() == cap_examples(50, None, 0, 0).tolist() == list(range(50))


def test_examples_that_are_held_back_are_in_no_source():
    members = [np.arange(0, 60, 2), np.arange(100, 130)]
    left, taken = hold_back(members, 20, seed=3)
    assert len(set(taken)) == 20
    assert sorted([*taken, *left[0], *left[1]]) == sorted([*members[0], *members[1]])
    assert all(set(some) <= set(whole) for some, whole in zip(left, members, strict=True))
    assert all(len(some) < len(whole) for some, whole in zip(left, members, strict=True)), "of one source only"
    assert taken.tolist() == sorted(taken)
    assert hold_back(members, 20, seed=3)[1].tolist() == taken.tolist()
    assert hold_back(members, 20, seed=4)[1].tolist() != taken.tolist()


@pytest.mark.parametrize("count", [30, 31, 99])
def test_a_source_of_which_nothing_would_be_left_is_refused(count):
    with pytest.raises(ValueError, match=rf"scoring_rows is {count}, .* of 1, 29 examples .* lower it"):
        hold_back([np.arange(1), np.arange(5, 34)], count, seed=0)
