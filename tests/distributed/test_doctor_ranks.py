"""What the doctor tries with several ranks: a rank on which it fails is named, and none is left waiting."""

import os

import pytest
from support import doctor_functions
from support.ranks import run_ranks

MIB = 2**20


def values(outcomes):
    assert all(outcome.error is None for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduces_are_right_and_timed_the_same_on_all_ranks(world_size):
    facts = values(run_ranks(doctor_functions.network, world_size))
    assert facts == [facts[0]] * world_size
    assert facts[0].backend == "gloo"
    assert facts[0].failures == {}
    assert list(facts[0].seconds) == [8, MIB, 16 * MIB]
    assert all(seconds > 0 for seconds in facts[0].seconds.values())


def test_a_rank_with_a_wrong_sum_is_named_before_anything_is_timed():
    for facts in values(run_ranks(doctor_functions.network_with_wrong_sums, 3, 2)):
        assert facts.failures == {2: "1 of 262,144 sums are wrong"}
        assert facts.seconds == {}


def test_a_rank_on_which_a_larger_tensor_fails_is_named_with_what_was_measured_before():
    for facts in values(run_ranks(doctor_functions.network_that_fails_at, 3, 16 * MIB)):
        assert facts.failures == {1: "RuntimeError: connection closed by peer"}
        assert list(facts.seconds) == [8, MIB]


def test_a_shared_folder_is_seen_by_all_and_left_empty(tmp_path):
    folder = tmp_path / "made" / "run"
    outcomes = values(run_ranks(doctor_functions.storage, 3, [str(folder)] * 3))
    for facts in outcomes:
        assert [of.node for of in facts] == ["node0", "node1", "node2"]
        assert all(of.sees and of.failure is None and of.write and of.read for of in facts)
    assert os.listdir(tmp_path) == []


def test_ranks_with_other_folders_do_not_see_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    folders = [str(tmp_path / name) for name in ("shared", "there", "missing")]
    for facts in values(run_ranks(doctor_functions.storage, 3, folders)):
        assert [of.sees for of in facts] == [True, False, False]
        assert [of.free is None for of in facts] == [False, False, True]
        assert all(of.failure is None for of in facts)
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


def test_a_folder_that_rank_0_cannot_make_ends_the_look_on_all(tmp_path):
    (tmp_path / "file").touch()
    for facts in values(run_ranks(doctor_functions.storage, 2, [str(tmp_path / "file" / "run")] * 2)):
        assert [of.failure for of in facts] == ["Not a directory", None]
