import bisect
import itertools
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.data import plan as plans
from dora_dist.data.mixture import Mixture, example_order
from dora_dist.data.plan import PACKING_WINDOW, PackedOrder, TrainingPlan, plan_by_length, plan_padded

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


def packed_order(lengths, capacity, seed):
    members, size = [np.arange(len(lengths))], len(lengths)
    return PackedOrder(lambda length: example_order(members, [size], length, seed), size, lengths, capacity, seed)


def all_packed(lengths, capacity, seed):
    """Every example once."""
    order = packed_order(lengths, capacity, seed)
    return order.plan(order.num_rows(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(64, 200), st.integers(0, 99))
def test_packing_loses_and_doubles_nothing_and_no_row_is_too_long(lengths, capacity, seed):
    plan = all_packed(lengths, capacity, seed)
    assert sorted(plan.examples) == list(range(len(lengths)))
    assert plan.row_lengths(lengths).max() <= capacity
    assert plan.row_lengths(lengths).sum() == lengths.sum()
    assert [lengths[plan.row(n)].sum() for n in range(plan.num_rows)] == plan.row_lengths(lengths).tolist()
    # Best fit decreasing never leaves two rows that are both at most half full.
    assert (plan.row_lengths(lengths) <= capacity / 2).sum() <= 1


def test_packing_saves_most_of_the_padding():
    source = np.random.default_rng(0)
    lengths = source.integers(10, 200, 4000)
    order = source.permutation(4000)
    padded, packed = plan_padded(order), all_packed(lengths, 512, seed=0)
    assert padded.padding_share(lengths, 8) > 0.35
    assert packed.padding_share(lengths, 8) < 0.02
    by_length = plan_by_length(order, lengths, 32, seed=0)
    assert by_length.padding_share(lengths, 8) < 0.1


@pytest.mark.parametrize("num_rows", [1, 700, 3000])
def test_a_packed_plan_of_some_rows_begins_one_of_more(num_rows):
    lengths = np.random.default_rng(1).integers(10, 200, 2000)
    plan = packed_order(lengths, 256, seed=5).plan(num_rows)
    longer = packed_order(lengths, 256, seed=5).plan(num_rows + 900)
    assert plan.num_rows == num_rows
    assert longer.first(num_rows).digest() == plan.digest()
    assert longer.digest() != plan.digest()
    assert PACKING_WINDOW < 4500, "else all of these would lie in one window"


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(64, 200), st.integers(0, 99), st.sampled_from([1, 7, 16, 300]), st.integers(1, 4))
def test_a_pass_of_packed_rows_has_every_example_once(lengths, capacity, seed, window, passes):
    with mock.patch.object(plans, "PACKING_WINDOW", window):
        order = packed_order(lengths, capacity, seed)
        plan = order.plan(order.num_rows(passes * len(lengths)))
        cut = order.plan(order.num_rows(round((passes + 0.5) * len(lengths))))
    assert np.bincount(plan.examples, minlength=len(lengths)).tolist() == [passes] * len(lengths)
    assert max(Counter(cut.examples.tolist()).values()) <= passes + 1
    assert all(len(set(plan.row(n).tolist())) == len(plan.row(n)) for n in range(plan.num_rows))


def test_the_windows_of_a_pass_are_of_about_the_same_size(monkeypatch):
    sizes, pack = [], PackedOrder._pack
    monkeypatch.setattr(PackedOrder, "_pack", lambda *given: sizes.append(len(given[2])) or pack(*given))
    monkeypatch.setattr(plans, "PACKING_WINDOW", 100)
    all_packed(np.full(301, 8), 64, seed=0)
    assert sizes == [75, 75, 75, 76]


def packed_anew(order, lengths, capacity, seed, window):
    """All of an order packed at once, and nothing kept."""
    rows, size = [], len(lengths)
    per_pass = -(-size // window)
    cuts = [number // per_pass * size + number % per_pass * size // per_pass for number in range(len(order) + 2)]
    for number, (start, end) in enumerate(itertools.pairwise([cut for cut in cuts if cut < len(order)] + [len(order)])):
        examples = order[start:end]
        found, room = [], []
        for example in examples[np.argsort(-lengths[examples], kind="stable")]:
            length = int(lengths[example])
            fitting = bisect.bisect_left(room, (length, -1))
            left, row = room.pop(fitting) if fitting < len(room) else (capacity, len(found))
            if row == len(found):
                found.append([])
            found[row].append(int(example))
            bisect.insort(room, (left - length, row))
        rows += [found[turn] for turn in np.random.default_rng((seed, 5, number)).permutation(len(found))]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return TrainingPlan(np.concatenate(rows).astype(np.int64), starts.astype(np.int64))


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    st.integers(64, 200),
    st.integers(0, 99),
    st.sampled_from([1, 7, 16, 300]),
    st.lists(st.tuples(st.booleans(), st.floats(0.01, 4)), min_size=1, max_size=5),
)
def test_what_is_kept_of_a_packing_changes_no_row_of_it(lengths, capacity, seed, window, requests):
    """Whatever was asked for before, in whatever order: windows that are full, and ones that the end cuts off."""
    size = len(lengths)
    mixture = Mixture(
        members=[np.arange(size)], counts=[size], lengths=lengths, batching="packed", max_length=capacity, seed=seed
    )
    with mock.patch.object(plans, "PACKING_WINDOW", window):
        for wants_plan, epochs in requests:
            anew = packed_anew(mixture.order(max(1, round(epochs * size))), lengths, capacity, seed, window)
            if not wants_plan:
                assert mixture.rows_of_epochs(epochs) == anew.num_rows
                continue
            enough = packed_anew(mixture.order(6 * size), lengths, capacity, seed, window)
            plan = mixture.plan(anew.num_rows, 1)
            assert plan.digest() == enough.first(anew.num_rows).digest()
            assert (plan.examples.dtype, plan.starts.dtype) == (np.int64, np.int64)


def test_every_window_is_packed_once(monkeypatch):
    packed, pack = Counter(), PackedOrder._pack

    def counted(self, number, examples):
        packed[number, len(examples)] += 1
        return pack(self, number, examples)

    monkeypatch.setattr(PackedOrder, "_pack", counted)
    monkeypatch.setattr(plans, "PACKING_WINDOW", 100)
    lengths = np.random.default_rng(0).integers(1, 64, 250)
    mixture = Mixture(
        members=[np.arange(250)], counts=[250], lengths=lengths, batching="packed", max_length=128, seed=0
    )
    num_rows = mixture.rows_of_epochs(2.5)
    assert mixture.rows_per_epoch < num_rows
    mixture.plan(num_rows, 1)
    mixture.plan(num_rows, 1)
    assert mixture.rows_of_epochs(2.5) == num_rows
    assert set(packed.values()) == {1}
    assert {key for key in packed if key[1] < 83} == {(7, 42)}, "where 2.5 epochs end"


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
