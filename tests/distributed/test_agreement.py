"""Collectives with real ranks: all of them agree, or all of them raise."""

import platform

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks

NODE = platform.node()
WORLDS = pytest.mark.parametrize("world_size", [2, 4])


@WORLDS
def test_mean_is_the_mean_with_the_same_bits_on_every_rank(world_size):
    outcomes = run_ranks(rank_functions.agreement_mean, world_size)
    mine, means = zip(*(outcome.value for outcome in outcomes), strict=True)
    torch.testing.assert_close(means[0], torch.stack(mine).mean(0), rtol=1e-14, atol=1e-15)
    assert all(torch.equal(mean, means[0]) for mean in means)


@pytest.mark.parametrize("flagged", [[], [1], [0, 1, 2]])
def test_a_flag_on_any_rank_is_seen_by_all(flagged):
    outcomes = run_ranks(rank_functions.agreement_any, 3, flagged)
    assert [outcome.value for outcome in outcomes] == [bool(flagged)] * 3


ONLY_GPUS = "cuda:gloo"
"""A process group that serves GPUs alone, as NCCL's does."""


@pytest.mark.parametrize("flagged", [[], [2]])
@pytest.mark.parametrize("backend", ["gloo", ONLY_GPUS])
def test_host_memory_is_exchanged_by_gloo_whatever_the_process_group_serves(backend, flagged):
    outcomes = run_ranks(rank_functions.host_exchanges, 3, flagged, backend=backend)
    expected = {"any": bool(flagged), "gather": [0, 1, 2], "a group of its own": backend == ONLY_GPUS}
    assert [outcome.value for outcome in outcomes] == [expected] * 3


def test_such_a_process_group_does_not_exchange_host_memory_itself():
    outcomes = run_ranks(rank_functions.sum_in_host_memory, 2, backend=ONLY_GPUS)
    assert {outcome.error for outcome in outcomes} == {"No backend type associated with device type cpu"}


def test_ranks_that_find_no_way_for_host_memory_say_how_to_name_one():
    outcomes = run_ranks(rank_functions.host_group_over, 2, "nowhere0", backend=ONLY_GPUS)
    assert {outcome.error_type for outcome in outcomes} == {"ExpectedRunError"}
    assert all("could not reach each other" in outcome.error for outcome in outcomes), outcomes
    assert all("Set GLOO_SOCKET_IFNAME to the network interface" in outcome.error for outcome in outcomes)


def test_an_exchange_from_host_memory_waits_no_longer_than_the_time_out():
    (outcome, _) = run_ranks(rank_functions.host_exchange_without_a_rank, 2, 1, backend=ONLY_GPUS)
    assert outcome.error_type == "RuntimeError"
    assert "timed out" in outcome.error.lower()


@WORLDS
def test_a_failure_on_one_rank_is_raised_on_all_and_names_it(world_size):
    outcomes = run_ranks(rank_functions.agreement_failure, world_size, 1)
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    assert {outcome.error for outcome in outcomes} == {
        f"scoring failed on 1 of {world_size} ranks: rank 1 ({NODE}): out of memory"
    }


def test_a_rank_with_another_state_is_named_on_all_ranks_with_the_first_difference():
    outcomes = run_ranks(rank_functions.agreement_digests, 4, 2)
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    (message,) = {outcome.error for outcome in outcomes}
    assert f"the ranks disagree on the test state: rank 2 ({NODE}) against ranks 0, 1, 3" in message
    assert "first difference in second" in message


def test_two_ranks_that_differ_are_both_named():
    outcomes = run_ranks(rank_functions.agreement_digests, 2, 1)
    assert all(f"rank 0 ({NODE}) against rank 1 ({NODE})" in outcome.error for outcome in outcomes)


@WORLDS
def test_a_trainer_that_believes_in_a_world_of_one_is_refused_on_all_ranks(world_size):
    outcomes = run_ranks(rank_functions.check_world_of_one, world_size)
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    assert all("TrainingArguments 1" in outcome.error for outcome in outcomes)


def test_ranks_that_see_the_same_data_are_refused_on_all_ranks():
    outcomes = run_ranks(rank_functions.check_same_data, 2)
    assert all("ranks [0, 1] are given the same examples [3, 1, 2]" in outcome.error for outcome in outcomes)


def test_a_phase_that_fails_on_one_rank_ends_on_all():
    outcomes = run_ranks(rank_functions.phase_that_fails, 4, [2])
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    assert all(
        f"reading failed on 1 of 4 ranks: rank 2 ({NODE}): OSError: no such file" in outcome.error
        for outcome in outcomes
    )


def test_a_phase_that_fails_alike_on_all_ranks_keeps_its_own_error():
    outcomes = run_ranks(rank_functions.phase_that_fails, 2, [0, 1])
    assert [(outcome.error_type, outcome.error) for outcome in outcomes] == [("OSError", "no such file")] * 2


@WORLDS
def test_adding_up_leaves_the_sum_in_place_on_every_rank(world_size):
    outcomes = run_ranks(rank_functions.agreement_sum, world_size)
    factor = world_size * (world_size + 1) // 2
    assert all(outcome.value.tolist() == [0, factor, 2 * factor, 3 * factor] for outcome in outcomes)


@WORLDS
def test_what_the_first_rank_has_is_taken_by_all(world_size):
    outcomes = run_ranks(rank_functions.agreement_first, world_size)
    assert [outcome.value.tolist() for outcome in outcomes] == [[0, 1, 2, 3]] * world_size


@WORLDS
def test_a_gather_through_the_store_is_the_same_on_every_rank(world_size):
    outcomes = run_ranks(rank_functions.store_gathers, world_size)
    expected = [[("first", rank) for rank in range(world_size)], ["gloo"] * world_size]
    assert [outcome.value for outcome in outcomes] == [expected] * world_size


@pytest.mark.parametrize(("absent", "named"), [([2], "rank 2 of 4"), ([1, 3], "ranks 1, 3 of 4"), ([0], "rank 0 of 4")])
def test_ranks_that_do_not_come_to_the_store_are_named_on_all_others(absent, named):
    outcomes = run_ranks(rank_functions.store_gather_without, 4, absent)
    for rank, outcome in enumerate(outcomes):
        if rank not in absent:
            assert outcome.error_type == "RankFailedError"
            assert outcome.error == f"{named} did not answer within 0.5 s"


def test_a_phase_that_fails_on_one_rank_is_told_through_the_store():
    outcomes = run_ranks(rank_functions.store_phase_that_fails, 2, 1)
    assert {outcome.error for outcome in outcomes} == {
        f"looking failed on 1 of 2 ranks: rank 1 ({NODE}): OSError: no such file"
    }


@pytest.mark.parametrize(("sizes", "smallest"), [([80, 24, 40], 24), ([80, None, 40], None)])
def test_the_smallest_card_is_the_same_on_all_ranks(sizes, smallest):
    outcomes = run_ranks(rank_functions.smallest_of_cards, 3, sizes)
    assert [outcome.value for outcome in outcomes] == [smallest] * 3
