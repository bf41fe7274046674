"""Starts from data on real ranks, which share the rows: the same bits on all of them, and the same directions on any
number of them."""

import platform

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks

INITS = pytest.mark.parametrize("init", ["inputs", "gradient", "lora_one"])


@INITS
def test_all_ranks_hold_the_same_bits_and_any_number_of_them_the_same_directions(init):
    alone, *others = (run_ranks(rank_functions.start_from_rows, world_size, init) for world_size in (1, 2, 4))
    (wanted,) = (outcome.value for outcome in alone)
    for outcomes in others:
        first = outcomes[0].value
        for outcome in outcomes:
            assert all(torch.equal(outcome.value[name], rows) for name, rows in first.items())
        for name, rows in first.items():
            torch.testing.assert_close(rows, wanted[name], atol=1e-5, rtol=0)


def test_ranks_without_a_row_take_part():
    outcomes = run_ranks(rank_functions.start_from_rows, 8, "inputs")
    assert [outcome.error for outcome in outcomes] == [None] * 8


def test_a_rank_that_cannot_read_its_rows_is_named_on_all():
    outcomes = run_ranks(rank_functions.start_from_rows, 2, "gradient", 1)
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    assert all(
        "pass 1 of 4 over 7 rows (adapter.init is gradient) failed on 1 of 2 ranks: "
        f"rank 1 ({platform.node()}): OSError: no such row" in outcome.error
        for outcome in outcomes
    )


@pytest.mark.parametrize("ranks", ["gradient_spectrum", "weight_gradient"])
def test_ranks_from_rows_are_the_same_on_any_number_of_processes(ranks):
    outcomes = [
        *run_ranks(rank_functions.ranks_from_rows, 2, ranks),
        *run_ranks(rank_functions.ranks_from_rows, 1, ranks),
    ]
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert len({tuple(outcome.value.items()) for outcome in outcomes}) == 1
    assert len(set(outcomes[0].value.values())) > 1
