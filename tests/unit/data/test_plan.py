import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.data.mixture import example_order
from dora_dist.data.plan import PACKING_WINDOW, packed_to, plan_by_length, plan_packed, plan_padded

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(64, 200), st.integers(0, 99))
def test_packing_loses_and_doubles_nothing_and_no_row_is_too_long(lengths, capacity, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    plan = plan_packed(order, lengths, capacity, seed)
    assert sorted(plan.examples) == sorted(order)
    assert plan.row_lengths(lengths).max() <= capacity
    assert plan.row_lengths(lengths).sum() == lengths.sum()
    assert [lengths[plan.row(n)].sum() for n in range(plan.num_rows)] == plan.row_lengths(lengths).tolist()
    # Best fit decreasing never leaves two rows that are both at most half full.
    assert (plan.row_lengths(lengths) <= capacity / 2).sum() <= 1


def test_packing_saves_most_of_the_padding():
    source = np.random.default_rng(0)
    lengths = source.integers(10, 200, 4000)
    order = source.permutation(4000)
    padded, packed = plan_padded(order), plan_packed(order, lengths, 512, seed=0)
    assert padded.padding_share(lengths, 8) > 0.35
    assert packed.padding_share(lengths, 8) < 0.02
    by_length = plan_by_length(order, lengths, 32, seed=0)
    assert by_length.padding_share(lengths, 8) < 0.1


@pytest.mark.parametrize("num_rows", [1, 700, 3000])
def test_a_packed_plan_of_some_rows_begins_one_of_more(num_rows):
    source = np.random.default_rng(1)
    lengths = source.integers(10, 200, 2000)
    members = [np.arange(2000)]

    def order(length):
        return example_order(members, [2000], length, seed=5)

    plan = packed_to(order, lengths, 256, seed=5, num_rows=num_rows)
    longer = packed_to(order, lengths, 256, seed=5, num_rows=num_rows + 900)
    assert plan.num_rows == num_rows
    assert longer.first(num_rows).digest() == plan.digest()
    assert longer.digest() != plan.digest()
    assert PACKING_WINDOW < 4500, "else all of these would lie in one window"


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(0, 99))
def test_grouping_by_length_only_moves_examples_inside_a_window(lengths, batch, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    plan = plan_by_length(order, lengths, batch, seed)
    window = 32 * batch
    for start in range(0, len(order), window):
        assert sorted(plan.examples[start : start + window]) == sorted(order[start : start + window])
    assert plan.num_rows == len(order)


def test_batches_of_one_length_come_in_random_order():
    lengths = np.arange(1, 3201)
    plan = plan_by_length(np.random.default_rng(0).permutation(3200), lengths, 100, seed=0)
    means = lengths[plan.examples].reshape(-1, 100).mean(axis=1)
    spread = np.ptp(lengths[plan.examples].reshape(-1, 100), axis=1)
    assert spread.max() == 99
    assert not (np.diff(means) > 0).all()


def test_padding_is_counted_as_it_is_computed():
    lengths = np.array([2, 4, 1, 3])
    assert plan_padded(np.arange(4)).padding_share(lengths, 2) == pytest.approx(1 - 10 / 14)
    assert plan_padded(np.arange(4)).padding_share(lengths, 1) == 0
