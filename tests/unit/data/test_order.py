from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.data.order import TrainingOrder

SIZES = {"num_examples": st.integers(1, 50), "num_samples": st.integers(0, 200), "seed": st.integers(0, 2**31 - 1)}


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_every_permutation_is_complete_and_the_last_is_cut_off(num_examples, num_samples, seed):
    order = list(TrainingOrder(num_examples, num_samples, seed))
    assert len(order) == num_samples == len(TrainingOrder(num_examples, num_samples, seed))
    for start in range(0, num_samples, num_examples):
        part = order[start : start + num_examples]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(num_examples))


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_a_position_depends_on_neither_run_length_nor_global_random_state(num_examples, num_samples, seed):
    longer = TrainingOrder(num_examples, num_samples + 77, seed)
    state = torch.get_rng_state()
    order = list(TrainingOrder(num_examples, num_samples, seed))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert list(longer)[:num_samples] == order
    assert list(longer) == list(longer), "iterating twice must give the same"


def test_permutations_differ_from_each_other_and_between_seeds():
    order = list(TrainingOrder(100, 300, seed=0))
    parts = [order[:100], order[100:200], order[200:], list(TrainingOrder(100, 100, seed=1)), list(range(100))]
    assert len({tuple(part) for part in parts}) == len(parts)


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 12, 1), (1, 4, 3), (2, 6, 1), (4, 3, 1), (2, 2, 3)])
def test_the_examples_of_a_step_do_not_depend_on_how_its_batch_is_split(ranks, micro, accumulation):
    order = TrainingOrder(num_examples=25, num_samples=60, seed=9)
    batches = list(torch.utils.data.BatchSampler(order, batch_size=micro, drop_last=False))
    per_step = ranks * accumulation
    steps = [list(chain(*batches[start : start + per_step])) for start in range(0, len(batches), per_step)]
    assert steps == [list(order)[start : start + 12] for start in range(0, 60, 12)]
