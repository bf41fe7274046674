"""The method on real ranks: one selection from the mean of all statistics, and no rank left behind."""

import platform

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks

from dora_dist.method.allocation import select_components

NODE = platform.node()

WORLDS = pytest.mark.parametrize("world_size", [2, 4])


@WORLDS
def test_ranks_with_different_statistics_select_by_their_mean(world_size):
    values = [outcome.value for outcome in run_ranks(rank_functions.prune_with_different_statistics, world_size)]
    names = rank_functions.NAMES
    assert any(not torch.equal(values[0]["local"][name], values[1]["local"][name]) for name in names)
    mean = {name: torch.stack([value["local"][name] for value in values]).mean(0) for name in names}
    expected = select_components(mean, len(names) * rank_functions.TARGET)
    alone = select_components(values[0]["local"], len(names) * rank_functions.TARGET)
    assert any(not torch.equal(expected[name], alone[name]) for name in names), "the test would prove nothing"
    for value in values:
        for name in names:
            assert torch.equal(value["masks"][name], expected[name])
            assert torch.equal(value["kept"][name], expected[name])
            assert not value["gates"][name][~expected[name]].any()


@pytest.mark.parametrize(
    ("world_size", "odd", "groups"), [(2, 1, f"rank 0 ({NODE}) against rank 1"), (4, 3, f"rank 3 ({NODE}) against")]
)
def test_a_rank_with_an_altered_adapter_is_named_on_all_ranks_at_the_next_event(world_size, odd, groups):
    outcomes = run_ranks(rank_functions.prune_with_altered_adapter, world_size, odd)
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    assert all("event of step 2" in outcome.error and groups in outcome.error for outcome in outcomes)
    assert all("first difference in blocks.0.up" in outcome.error for outcome in outcomes)


def test_a_rank_with_an_altered_mask_is_found_at_the_end():
    outcomes = run_ranks(rank_functions.prune_with_altered_mask, 2, 1)
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    assert all("first difference in blocks.1.up" in outcome.error for outcome in outcomes)


@pytest.mark.parametrize("kind", ["nan", "inf", "raises"])
@WORLDS
def test_a_rank_that_cannot_score_makes_all_ranks_raise_and_is_named(world_size, kind):
    outcomes = run_ranks(rank_functions.prune_with_bad_scores, world_size, world_size - 1, kind)
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    reason = "MemoryError" if kind == "raises" else "non-finite"
    for outcome in outcomes:
        assert f"failed on 1 of {world_size} ranks: rank {world_size - 1} ({NODE}): " in outcome.error
        assert reason in outcome.error


@WORLDS
def test_a_rank_that_fails_to_score_ends_all_ranks_after_that_step(world_size):
    outcomes = run_ranks(rank_functions.end_step_with_bad_scores, world_size, world_size - 1)
    assert {outcome.error_type for outcome in outcomes} == {"RankFailedError"}
    assert len({outcome.error for outcome in outcomes}) == 1
    assert outcomes[0].error == (
        f"scoring components by step 1 failed on 1 of {world_size} ranks: rank {world_size - 1} ({NODE}): "
        "MemoryError after step 1: no memory left on this rank"
    )


def test_a_rank_with_an_altered_head_is_named_on_all_ranks():
    outcomes = run_ranks(rank_functions.verify_altered_head, 2, 1)
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    assert all("first difference in classifier.weight of the head" in outcome.error for outcome in outcomes)
    assert all("the adapter before the checkpoint" in outcome.error for outcome in outcomes)
