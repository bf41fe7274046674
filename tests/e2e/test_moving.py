"""Runs whose events move components between layers (pruning.rule move)."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import steps_of
from support.forked_run import finished_run, run_to_the_end
from support.same_run import assert_same_course, assert_same_run, stopped_at

from dora_dist.console.files import read_lines

RULE: dict[str, Any] = {
    "adapter": {"target_rank": 2, "initial_rank": None, "slots": 4},
    "pruning": {"rule": "move", "importance": "ablation_gradient", "moved_per_event": 3, "scoring_rows": 6},
}
LAYERS = 14


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """A run of two ranks under ZeRO-2, a checkpoint after every step."""
    return finished_run(tmp_path_factory.mktemp("moved"), **RULE)[0]


def test_every_event_moves_components_and_keeps_their_number(moved):
    run = moved.parent / "run"
    events = read_lines(run / "allocation.jsonl")
    before = {name: {0, 1} for name in events[0]["kept"]}
    assert len(before) == LAYERS
    for event in events:
        kept = {name: set(indices) for name, indices in event["kept"].items()}
        assert event["num_kept"] == sum(map(len, kept.values())) == 2 * LAYERS
        gone = {name: before[name] - kept[name] for name in kept}
        new = {name: kept[name] - before[name] for name in kept}
        assert sum(map(len, gone.values())) == sum(map(len, new.values())) == event["returned"]
        assert event["returned"] == 3
        assert not any(gone[name] and new[name] for name in kept)
        before = kept
    # Of the two steps in which the schedule's time is 0, the first is in the warm-up: it is no event.
    assert [event["step"] for event in events] == [2, 4, 6]
    assert events[-1]["final"]
    assert json.loads((run / "run.json").read_text())["data"]["held_back"] == 6
    assert {line["components"] for line in steps_of(run)} == {2 * LAYERS}


def test_the_adapter_is_plain_lora_of_the_ranks_of_the_last_event(moved):
    from dora_dist.adapter.plain_lora import read_lora_adapter

    run = moved.parent / "run"
    summary = json.loads((run / "summary.json").read_text())
    adapter = read_lora_adapter(run / "adapter")
    ranks = {name: rank for name, rank in summary["ranks"].items() if rank}
    assert {name: len(rows) for name, (rows, _) in adapter.items()} == ranks
    assert max(summary["ranks"].values()) > 2


@pytest.mark.full("ranks")
def test_moves_do_not_depend_on_the_engine(moved, tmp_path):
    run_to_the_end(moved, tmp_path / "run", tmp_path / "log", engine="ddp")
    assert_same_course(moved.parent / "run", tmp_path / "run")


@pytest.mark.full("ranks")
def test_moves_do_not_depend_on_world_size_or_accumulation(moved, tmp_path):
    one = ("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4")
    run_to_the_end(moved, tmp_path / "run", tmp_path / "log", *one, ranks=1, engine="none")
    assert_same_course(moved.parent / "run", tmp_path / "run")


def test_a_resumed_run_is_the_same_bit_for_bit(moved, tmp_path):
    resumed = stopped_at(5, moved.parent / "run", tmp_path)  # events are after steps 2, 4 and 6
    run_to_the_end(moved, resumed, tmp_path / "log")
    assert_same_run(moved.parent / "run", resumed)


@pytest.mark.full("ranks")
def test_another_number_of_ranks_goes_on_with_the_same_course(moved, tmp_path):
    resumed = stopped_at(3, moved.parent / "run", tmp_path)
    one = ("--training.per_device_train_batch_size", "8")
    run_to_the_end(moved, resumed, tmp_path / "log", *one, ranks=1)
    assert_same_course(moved.parent / "run", resumed)
