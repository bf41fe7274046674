"""Runs that prune nothing: plain LoRA, and ranks by a plan that another run has written."""

import json
from pathlib import Path

import pytest
import yaml
from support.forked_run import finished_run, run_that_fails, run_to_the_end
from support.same_run import assert_same_course, assert_same_run, stopped_at

from dora_dist.adapter.plain_lora import read_lora_adapter


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """Configuration of a finished run of two ranks under ZeRO-2, with a scale by rank and another rate for columns."""
    adapter, training = {"scale": "sqrt_rank"}, {"lora_plus_ratio": 4}
    folder = tmp_path_factory.mktemp("pruned")
    return finished_run(folder, adapter=adapter, pruning={"regrow": False}, training=training)[0]


def ranks_of(run: Path) -> dict[str, int]:
    return {name: len(lora_a) for name, (lora_a, _) in read_lora_adapter(run / "adapter").items()}


def plan_of(run: Path) -> dict[str, int]:
    written = json.loads((run / "plan.json").read_text())
    return {name: rank for name, rank in written["ranks"].items() if rank}


@pytest.mark.full("ranks")
def test_a_scale_by_rank_and_two_rates_do_not_depend_on_the_number_of_ranks(pruned, tmp_path):
    one = ("--training.gradient_accumulation_steps", "2")
    run_to_the_end(pruned, tmp_path / "run", tmp_path / "log", *one, ranks=1, engine="none")
    assert_same_course(pruned.parent / "run", tmp_path / "run")


def test_a_run_with_them_is_resumed_bit_for_bit_between_its_events(pruned, tmp_path):
    resumed = stopped_at(5, pruned.parent / "run", tmp_path)
    run_to_the_end(pruned, resumed, tmp_path / "log")
    assert_same_run(pruned.parent / "run", resumed)


def test_the_plan_of_a_run_trains_another_one(pruned, tmp_path):
    found = pruned.parent / "run" / "plan.json"
    assert plan_of(found.parent) == ranks_of(found.parent)
    plan = tmp_path / "plan.json"
    plan.write_text(found.read_text())
    fixed = ("--preset", "lora", "--adapter.initial_rank", "null", "--adapter.ranks", str(plan))
    output = run_to_the_end(pruned, tmp_path / "run", tmp_path / "log", *fixed)
    assert "none pruned" in output
    run = tmp_path / "run"
    assert ranks_of(run) == plan_of(run) == ranks_of(found.parent)
    events = [json.loads(line) for line in (run / "allocation.jsonl").read_text().splitlines()]
    assert [(event["step"], event["final"]) for event in events] == [(0, True)]

    (tmp_path / "again").mkdir()
    resumed = stopped_at(5, run, tmp_path / "again")
    run_to_the_end(pruned, resumed, tmp_path / "log2", *fixed)
    assert_same_run(run, resumed)

    written = json.loads(plan.read_text())
    first = min(name for name, rank in written["ranks"].items() if rank)
    written["ranks"][first] += 1
    plan.write_text(json.dumps(written))
    (tmp_path / "other").mkdir()
    status, text = run_that_fails(pruned, stopped_at(5, run, tmp_path / "other"), tmp_path / "log3", *fixed)
    assert status == 2
    assert "adapter.ranks was" in text


def test_a_preset_is_written_out(pruned, tmp_path):
    saved = yaml.safe_load((pruned.parent / "run" / "config.yaml").read_text())
    assert saved["preset"] == "paper"
    assert saved["pruning"]["rule"] == "prune"
    assert saved["adapter"]["train_gates"] is True
