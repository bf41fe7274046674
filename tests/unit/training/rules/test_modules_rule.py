"""The rule that chooses modules, in one process: what its one event does to the model, and what it refuses."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.importance import weight_criterion
from dora_dist.method.layer_names import split_name
from dora_dist.method.modules import select_modules
from dora_dist.method.schedule import OneEvent
from dora_dist.training.controller import BudgetMissedError, DynamicRankController
from dora_dist.training.criterion import SmoothedScores, parameters_of
from dora_dist.training.rules.modules_per_layer import ModulesPerLayer


def make_controller(per_block: int = 2, shaken: bool = True) -> DynamicRankController:
    """Twelve steps, the event after step 6, two components in every layer, scored by their norm without a past."""
    model = adapt(tiny_model(), initial_rank=2)
    layers = (shake(model) if shaken else model).adapted_layers()
    schedule = OneEvent(total_steps=12, num_layers=len(layers), initial_rank=2, target_rank=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(schedule, component_costs(shapes, PARAMETERS))
    criterion = SmoothedScores(weight_criterion("magnitude", 0), 0.0, layers.values())
    rule = ModulesPerLayer(layers, budget, per_block)
    return DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=rule)


def test_one_event_leaves_the_best_modules_whole_and_takes_the_others_out(capsys):
    controller = make_controller()
    layers = controller.layers
    scores = weight_criterion("magnitude", 0)(parameters_of(layers.values()))
    wanted = select_modules(dict(zip(layers, scores, strict=True)), controller.budget.costs, controller.budget.final, 2)
    assert controller.penalty() is None
    events = [event for step in range(1, 13) if (event := controller.after_optimizer_step(step))]
    assert [event.step for event in events] == [6]
    assert {name for name, rank in events[0].ranks.items() if rank} == wanted.keys()
    assert {name: rank for name, rank in events[0].planned.items() if rank} == wanted
    for name, layer in layers.items():
        assert layer.component_mask.tolist() == [name in wanted] * 2
        assert (layer.gate != 0).tolist() == [name in wanted] * 2
    assert controller.plan == events[0].planned
    assert {split_name(name).block for name in wanted} == {"model.layers.0", "model.layers.1"}
    assert "step 6: 2 modules of every block stay, 4 of 14" in capsys.readouterr().err


def test_modules_that_stay_are_what_they_were_and_modules_that_go_leave_the_output():
    model = shake(adapt(tiny_model(), initial_rank=2))
    layers = model.adapted_layers()
    budget = Budget(OneEvent(total_steps=12, num_layers=14, initial_rank=2, target_rank=2), dict.fromkeys(layers, 1))
    rule = ModulesPerLayer(layers, budget, 7)
    scores = {name: torch.ones(2) for name in layers}
    kept = {name: torch.ones(2, dtype=torch.bool) for name in layers}
    before = logits(model)
    rule.apply(6, kept, rule.select(6, scores, kept), None)
    assert torch.equal(logits(model), before)
    assert rule.plan(6, scores) == dict.fromkeys(layers, 2)
    fewer = ModulesPerLayer(layers, budget, 1)
    fewer.apply(6, kept, fewer.select(6, scores, kept), None)
    assert not torch.allclose(logits(model), before)


def test_the_end_is_judged_by_the_plan():
    controller = make_controller()
    for step in range(1, 13):
        controller.after_optimizer_step(step)
    controller.finish()
    controller.planned = {name: rank + 1 for name, rank in controller.plan.items()}
    with pytest.raises(BudgetMissedError, match=r"components \(cost .*\) are planned instead of the budget"):
        controller.finish()


def test_the_plan_outlives_a_checkpoint():
    controller, other = make_controller(), make_controller()
    for step in range(1, 8):
        controller.after_optimizer_step(step)
    other.load_state_dict(controller.state_dict(), 7)
    assert other.plan == controller.plan
    other.finish()
    before = make_controller()
    before.load_state_dict(make_controller().state_dict(), 0)
    assert before.planned is None


def test_an_adapter_that_has_not_moved_gives_nothing_to_choose_by():
    controller = make_controller(shaken=False)
    for step in range(1, 6):
        controller.after_optimizer_step(step)
    with pytest.raises(RankFailedError, match="all scores are 0, so there is nothing to select by"):
        controller.after_optimizer_step(6)
