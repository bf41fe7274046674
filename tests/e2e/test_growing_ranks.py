"""Runs whose events give layers new components (pruning.rule grow)."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import steps_of
from support.forked_run import finished_run, run_to_the_end
from support.same_run import assert_same_course, assert_same_run, stopped_at
from transformers import AutoModelForCausalLM

from dora_dist.console.files import read_lines
from dora_dist.training.rules.grow import RESERVE_GATE

RULE: dict[str, Any] = {"adapter": {"target_rank": 2, "initial_rank": None}, "pruning": {"rule": "grow"}}
LAYERS = 14


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """A run of two ranks under ZeRO-2, a checkpoint after every step."""
    return finished_run(tmp_path_factory.mktemp("grown"), **RULE)[0]


def test_events_grow_to_the_budget_and_take_nothing_away(grown):
    run = grown.parent / "run"
    events = read_lines(run / "allocation.jsonl")
    assert [(event["step"], event["num_kept"], event["returned"]) for event in events] == [
        (1, LAYERS, 0),
        (2, LAYERS, 0),
        (4, LAYERS * 3 // 2, LAYERS // 2),
        (6, 2 * LAYERS, LAYERS // 2),
    ]
    assert events[-1]["final"]
    for before, after in itertools.pairwise(events):
        # The first free slots: those of a layer are filled in their order.
        assert all(kept == list(range(len(kept))) for kept in after["kept"].values())
        assert all(set(before["kept"][name]) <= set(kept) for name, kept in after["kept"].items())
    assert [line["components"] for line in steps_of(run)] == [14, 14, 14, 21, 21, *[28] * 7]


def test_the_gate_of_a_reserve_does_not_move_while_its_vectors_train(grown):
    before, after = (load_file(grown.parent / f"run/checkpoint-{step}/dynamic_lora.safetensors") for step in (1, 3))
    names = [name.removesuffix(".gate") for name in after if name.endswith(".gate")]
    assert len(names) == LAYERS
    for name in names:
        assert after[f"{name}.component_mask"].tolist() == [True, True, False, False]
        assert after[f"{name}.kept"].tolist() == [True, False, False, False]
        assert after[f"{name}.gate"][1] == torch.tensor(RESERVE_GATE)
        assert after[f"{name}.gate"][0] != 1
        assert not torch.equal(after[f"{name}.lora_b"][:, 1], before[f"{name}.lora_b"][:, 1])
        assert not after[f"{name}.lora_b"][:, 2:].any()


def test_the_adapter_in_stock_peft_is_what_was_granted_and_no_reserve(grown):
    run = grown.parent / "run"
    ranks = json.loads((run / "summary.json").read_text())["ranks"]
    assert sum(ranks.values()) == 2 * LAYERS
    last = load_file(run / "checkpoint-12/dynamic_lora.safetensors")
    base = AutoModelForCausalLM.from_pretrained(grown.parent / "model", dtype=torch.float32)
    PeftModel.from_pretrained(base, run / "adapter")
    for name, rank in ranks.items():
        parts = [last[f"{name}.{part}"] for part in ("lora_a", "gate", "lora_b", "component_mask")]
        lora_a, gate, lora_b, mask = parts
        assert int(mask.sum()) == rank
        update = 2.0 * (lora_b[:, :rank] * gate[:rank]) @ lora_a[:rank]  # alpha 4, over the target rank
        torch.testing.assert_close(base.get_submodule(name).get_delta_weight("default"), update, rtol=1e-5, atol=1e-8)


def test_a_resumed_run_is_the_same_bit_for_bit(grown, tmp_path):
    # Of components that have just been granted, and learn slowly; events are after steps 2, 4 and 6.
    resumed = stopped_at(4, grown.parent / "run", tmp_path)
    run_to_the_end(grown, resumed, tmp_path / "log")
    assert_same_run(grown.parent / "run", resumed)


@pytest.mark.full("ranks")
def test_growth_does_not_depend_on_the_engine(grown, tmp_path):
    run_to_the_end(grown, tmp_path / "run", tmp_path / "log", engine="ddp")
    assert_same_course(grown.parent / "run", tmp_path / "run")


@pytest.mark.full("ranks")
def test_growth_does_not_depend_on_world_size_or_accumulation(grown, tmp_path):
    one = ("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4")
    run_to_the_end(grown, tmp_path / "run", tmp_path / "log", *one, ranks=1, engine="none")
    assert_same_course(grown.parent / "run", tmp_path / "run")


@pytest.mark.full("ranks")
def test_another_number_of_ranks_goes_on_with_the_same_course(grown, tmp_path):
    resumed = stopped_at(4, grown.parent / "run", tmp_path)
    one = ("--training.per_device_train_batch_size", "8")
    run_to_the_end(grown, resumed, tmp_path / "log", *one, ranks=1)
    assert_same_course(grown.parent / "run", resumed)
