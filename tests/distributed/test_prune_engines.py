"""Soft prune, regrowth and the hard mask under every engine, read from parameter, master copy and output."""

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks
from support.tiny_run import save_tiny_model

PRUNED = torch.tensor([False, True, False, True])


@pytest.fixture(scope="module", params=["none", "ddp", "zero2"])
def run(request, tmp_path_factory):
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    world_size = 1 if request.param == "none" else 2
    outcomes = run_ranks(rank_functions.prune_under_engine, world_size, request.param, str(model))
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    return request.param, [outcome.value for outcome in outcomes]


def test_the_engine_is_the_real_one(run):
    engine, seen = run
    expected = {"none": "DynamicLoraForCausalLM", "ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}[engine]
    assert [value["engine"] for value in seen] == [expected] * len(seen)


def test_zeroing_in_place_is_undone_under_zero(run):
    """The reason for zero_entries; if this fails, ZeRO has changed and so may the code."""
    engine, seen = run
    for value in seen:
        far_from_zero = value["naive"][PRUNED].abs() > 0.5
        assert far_from_zero.all() if engine == "zero2" else not far_from_zero.any()


def test_the_soft_prune_sets_parameter_and_master_copy(run):
    for value in run[1]:
        assert not value["soft_live"][PRUNED].any()
        assert not value["soft_master"][PRUNED].any()
        assert value["soft_live"][~PRUNED].all()
        assert torch.equal(value["soft_live"], value["soft_master"])


def test_softly_pruned_components_grow_back_slowly(run):
    for value in run[1]:
        regrown = value["regrown"][PRUNED].abs()
        assert regrown.gt(0).all()
        assert regrown.lt(0.1).all(), "the gate came back at once: a prune that was undone, not regrowth"


def test_masked_components_are_out_of_the_output_whatever_the_optimizer_did(run):
    for value in run[1]:
        assert value["hard_live"][PRUNED].any(), "the optimizer did not touch the gates: the test would prove nothing"
        assert value["hard_master"][PRUNED].any()
        torch.testing.assert_close(value["output"], value["expected"], rtol=1e-5, atol=1e-6)
        assert torch.equal(value["output"], value["output_with_huge_gates"])


def test_all_ranks_hold_the_same_gates(run):
    for value in run[1]:
        assert torch.equal(value["hard_live"], run[1][0]["hard_live"])


def test_columns_are_scaled_in_parameter_and_master_copy(run):
    for value in run[1]:
        columns = value["columns"]
        assert torch.equal(columns["live"], columns["before"] * 0.5)
        assert torch.equal(columns["master"], columns["master before"] * 0.5)
        moved = (columns["a step later"] - columns["live"]).abs().max()
        assert 0 < moved < 0.1 * columns["before"].abs().max(), "undone by the next step, or no step was taken"
