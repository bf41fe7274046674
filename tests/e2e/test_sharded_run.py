"""Runs with a base in shards: those with a whole base, bit for bit, also where one goes on from the other."""

import re

import pytest
from support.faulty_rank import faulty_rank
from support.forked_run import log_of, run_to_the_end, start_run
from support.ranks import wait_for_ranks
from support.same_run import assert_same_course, assert_same_run, stopped_at
from support.tiny_encoders import write_summaries
from support.tiny_run import write_config

from dora_dist.console.errors import PREEMPTED

SHARDED = ("--distributed.shard_base", "true")
FULL = pytest.mark.full("ranks")
ANSWERS = {"before": True, "exact_match": True, "max_new_tokens": 4, "max_examples": 5}
"""Of which two ranks generate different numbers, of different lengths."""


def assert_same_with_shards(config, folder, over="true", ranks=2):
    """Two runs of a configuration, with a whole base and with one in shards, are equal bit for bit."""
    for name, options in (("whole", ()), ("shards", ("--distributed.shard_base", over))):
        run_to_the_end(config, folder / name, folder / f"{name}.log", *options, ranks=ranks, engine="ddp")
    assert_same_run(folder / "whole", folder / "shards")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A start from data, generated answers, dropout and recomputed layers."""
    training = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return write_config(
        tmp_path_factory.mktemp("sharded"),
        preset="2026-11",
        adapter={"dropout": 0.1, "calibration_rows": 3},
        model={"recompute_layers": 1},
        evaluation=ANSWERS,
        distributed={"engine": "ddp"},
        training={**training, "warmup_steps": 0},
    )


@pytest.fixture(scope="module")
def whole(config):
    """The run that holds the whole base on each of two ranks."""
    folder = config.parent / "whole"
    run_to_the_end(config, folder, config.parent / "whole.log", engine="ddp")
    return folder


def test_the_run_is_that_of_a_whole_base_bit_for_bit(config, whole, tmp_path):
    run_to_the_end(config, tmp_path / "run", tmp_path / "log", *SHARDED, engine="ddp")
    assert_same_run(whole, tmp_path / "run")
    sizes = [
        sum(path.stat().st_size for path in run.glob("checkpoint-6/*.safetensors")) for run in (whole, tmp_path / "run")
    ]
    assert sizes[0] == sizes[1]


@FULL
@pytest.mark.parametrize("first", ["whole", "sharded"])
def test_a_run_goes_on_with_a_base_in_shards_and_with_a_whole_one(first, config, whole, tmp_path):
    run = stopped_at(3, whole, tmp_path)
    if first == "sharded":
        run_to_the_end(config, tmp_path / "other", tmp_path / "log", *SHARDED, engine="ddp")
        (tmp_path / "again").mkdir()
        run = stopped_at(3, tmp_path / "other", tmp_path / "again")
    text = run_to_the_end(config, run, tmp_path / "log-on", *(SHARDED if first == "whole" else ()), engine="ddp")
    assert "resuming from" in text
    assert_same_run(whole, run)


@FULL
def test_four_ranks_take_the_same_course_with_a_base_in_shards_of_each_node(config, tmp_path):
    assert_same_with_shards(config, tmp_path, "node", ranks=4)


@FULL
@pytest.mark.parametrize("importance", ["ablation", "ablation_gradient"])
def test_components_are_scored_by_ablation_as_with_a_whole_base(importance, tmp_path):
    config = write_config(
        tmp_path,
        adapter={"initial_rank": None},
        pruning={
            **{"rule": "modules_per_layer", "modules_per_layer": 4},
            **{"importance": importance, "scoring_rows": 3},
        },
        training={"max_steps": 4},
    )
    assert_same_with_shards(config, tmp_path)


@FULL
@pytest.mark.parametrize("ranks", ["gradient_spectrum", "weight_gradient"])
def test_ranks_from_data_are_those_of_a_whole_base(ranks, tmp_path):
    config = write_config(
        tmp_path,
        preset="lora",
        adapter={"ranks": ranks, "calibration_rows": 3, "init": "gradient", "initial_rank": None},
        training={"max_steps": 2},
    )
    assert_same_with_shards(config, tmp_path)


@pytest.mark.full("faults")
def test_a_rank_that_dies_while_the_others_gather_is_named(config, tmp_path):
    processes = start_run(
        config,
        tmp_path / "run",
        tmp_path / "log",
        *SHARDED,
        target=faulty_rank,
        more=({1: {"kill": "forward 5"}}, "ddp"),
    )
    wait_for_ranks(processes, timeout=120)
    text = log_of(tmp_path / "log")
    assert [process.exitcode for process in processes] == [PREEMPTED, -9], text
    (message,) = [line for line in text.splitlines() if line.startswith("[rank 0] error: ")]
    assert re.search("rank 1 .* is not responding.*this rank was in: forward, backward and update of step 5", message)
    assert "Traceback" not in text
    assert "resuming from" in run_to_the_end(config, tmp_path / "run", tmp_path / "log", *SHARDED, engine="ddp")


@FULL
def test_a_checkpoint_of_zero2_goes_on_with_a_base_in_shards_and_back(tmp_path):
    config = write_config(tmp_path)
    runs = {"zero2": (), "ddp": SHARDED}
    for engine, options in runs.items():
        run_to_the_end(config, tmp_path / engine, tmp_path / f"{engine}.log", *options, engine=engine)
    for before, after in (("zero2", "ddp"), ("ddp", "zero2")):
        folder = tmp_path / f"{before}-{after}"
        folder.mkdir()
        run = stopped_at(5, tmp_path / before, folder)
        text = run_to_the_end(config, run, folder / "log", *runs[after], engine=after)
        assert f"it was written under the engine {before}, and this is {after}" in text
        assert_same_course(tmp_path / before, run)


@pytest.mark.full("tasks")
@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_summaries_are_trained_and_written_as_with_a_whole_base(architecture, tmp_path):
    """Encoder and decoder are called on their own, and each rank writes summaries of other lengths. The
    gradient of the encoder's output is added up in another order (docs/scale.md), else nothing differs
    (distributed/test_sharded_base.py)."""
    config = write_summaries(tmp_path, architecture, training={"max_steps": 4, "learning_rate": 3e-2})
    for name, options in (("whole", ()), ("shards", SHARDED)):
        run_to_the_end(config, tmp_path / name, tmp_path / f"{name}.log", *options, engine="ddp")
    assert_same_course(tmp_path / "whole", tmp_path / "shards", allocations=2)
