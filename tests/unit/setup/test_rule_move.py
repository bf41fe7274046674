"""What is decided of a run whose events move components."""

import torch
from support.resolved_run import load, resolved
from support.tiny_run import tiny_tokenizer, write_run

from dora_dist.distributed.agreement import Agreement
from dora_dist.memory.estimate import estimate_memory
from dora_dist.setup.build import build_controller, load_model
from dora_dist.setup.describe import banner, describe
from dora_dist.training.rules.ablation import Ablation
from dora_dist.training.rules.move import Move

MOVE = {
    "adapter": {"initial_rank": None, "slots": 5},
    "pruning": {"rule": "move", "importance": "ablation", "moved_per_event": 3, "scoring_rows": 6},
}


def test_rows_that_score_are_not_trained_on_and_the_dry_run_says_when_components_move(config):
    settings = load(write_run(config.parent, {"data": {"train": str(config.parent / "train.jsonl")}}, MOVE))
    run = resolved(settings)
    assert len(run.mixture.held_back) == 6
    assert not set(run.mixture.held_back) & set(run.plan.examples)
    assert len(set(run.plan.examples)) == 44
    assert run.describe_data()["held_back"] == 6
    assert "budget of 28 components, of which 3 components move after steps\n  2, 4, 6" in describe(settings, run, 1)
    assert "28 components, moved between layers of 5 slots, scale 2.00" in banner(settings, run, 1)


def test_the_controller_has_the_rule_and_its_importance_and_the_adapter_its_slots(config):
    settings = load(write_run(config.parent, {"data": {"train": str(config.parent / "train.jsonl")}}, MOVE))
    run = resolved(settings)
    model = load_model(settings, torch.device("cpu"), tiny_tokenizer())
    controller = build_controller(settings.pruning, 0, model, Agreement(), run.budget)
    assert isinstance(controller.rule, Move)
    assert isinstance(controller.criterion, Ablation)
    assert controller.num_kept == run.budget.initial == run.budget.final == 28
    assert {len(layer.gate) for layer in controller.layers.values()} == {5}


def test_the_estimate_counts_slots_and_not_the_components_in_them(config):
    data = {"data": {"train": str(config.parent / "train.jsonl")}}
    moving = load(write_run(config.parent, data, MOVE))
    found = estimate_memory(moving, 1).configured.resident
    pruning = load(write_run(config.parent, data, {"adapter": {"initial_rank": 5}}))
    assert found == estimate_memory(pruning, 1).configured.resident
    assert found != estimate_memory(load(write_run(config.parent, data)), 1).configured.resident
