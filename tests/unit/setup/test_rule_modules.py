"""What is decided of a run that chooses modules."""

import pytest
import torch
from support.resolved_run import load, resolved
from support.tiny_run import tiny_tokenizer, write_run

from dora_dist.distributed.agreement import Agreement
from dora_dist.setup.build import build_controller, load_model
from dora_dist.setup.describe import banner, describe
from dora_dist.training.rules.ablation import Ablation
from dora_dist.training.rules.modules_per_layer import ModulesPerLayer

RULE = {
    "adapter": {"initial_rank": None},
    "pruning": {"rule": "modules_per_layer", "importance": "ablation_gradient", "scoring_rows": 6},
}


def settings_of(config, **pruning):
    data = {"data": {"train": str(config.parent / "train.jsonl")}}
    return load(write_run(config.parent, data, RULE, {"pruning": pruning}))


def test_the_run_has_one_event_and_the_dry_run_says_what_it_does(config):
    settings = settings_of(config)
    run = resolved(settings)
    assert run.budget.schedule.prune_steps == [6]
    assert run.budget.initial == run.budget.final == 28
    assert not any("pruning events" in remark for remark in run.remarks())
    said = "28 components, of which 3 modules of every block stay after step 6"
    assert f"budget of {said}; plan.json gives them the whole budget" in describe(settings, run, 1)
    assert f"{said}, scale 2.00" in banner(settings, run, 1)


def test_the_controller_has_the_rule_and_any_importance(config):
    settings = settings_of(config)
    run = resolved(settings)
    model = load_model(settings, torch.device("cpu"), tiny_tokenizer())
    controller = build_controller(settings.pruning, 0, model, Agreement(), run.budget)
    assert isinstance(controller.rule, ModulesPerLayer)
    assert isinstance(controller.criterion, Ablation)
    assert controller.num_kept == 28


@pytest.mark.parametrize(
    ("adapter", "pruning", "message"),
    [
        ({}, {"modules_per_layer": 8}, r"modules_per_layer is 8, but must be 1 to 7, .* of model\.layers\.0"),
        (
            {"target_rank": 4},
            {"modules_per_layer": 1, "budget_unit": "parameters"},
            "modules_per_layer is 1 and adapter.target_rank is 4, so that .* a rank of 43, but .*_proj can have 32",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_weights_are_read(config, adapter, pruning, message):
    data = {"data": {"train": str(config.parent / "train.jsonl")}}
    settings = load(write_run(config.parent, data, RULE, {"adapter": adapter, "pruning": pruning}))
    with pytest.raises(ValueError, match=message):
        resolved(settings)
