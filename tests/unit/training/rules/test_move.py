"""The rule that moves components, in one process: what an event does to the model."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.rules.move import Move


def make_controller(unit: str = PARAMETERS, shaken: bool = True, **options) -> DynamicRankController:
    """Forty steps, the first event after step 6, the last one after step 20; two components in five slots."""
    model = adapt(tiny_model(), slots=5)
    layers = (shake(model) if shaken else model).adapted_layers()
    schedule = BudgetSchedule(total_steps=40, num_layers=len(layers), initial_rank=2, target_rank=2, interval=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(schedule, component_costs(shapes, unit))
    rule = Move(layers, budget, **{"num_moved": 4, "seed": 1, **options})
    return DynamicRankController(layers, budget, Agreement(), rule=rule)


def test_slots_beyond_the_target_start_masked_and_change_nothing():
    model = shake(adapt(tiny_model(), slots=5, alpha=8.0))
    assert all(layer.component_mask.tolist() == [True] * 2 + [False] * 3 for layer in model.adapted_layers().values())
    assert {layer.scale for layer in model.adapted_layers().values()} == {4.0}
    before = logits(model)
    for layer in model.adapted_layers().values():
        layer.lora_b.data[:, 2:] = 100
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("unit", ["components", PARAMETERS])
def test_events_keep_the_budget_and_the_run_ends_with_it(unit):
    controller = make_controller(unit)
    assert controller.num_kept == 2 * len(controller.layers)
    assert controller.penalty() is None
    events = [event for step in range(1, 41) if (event := controller.after_optimizer_step(step))]
    controller.finish()
    for event in events:
        assert controller.budget.is_met_by(event.ranks)
        assert event.returned > 0
    assert len(events) == 8
    for name, layer in controller.layers.items():
        assert torch.equal(layer.component_mask, events[-1].kept[name])
        assert torch.equal(layer.effective_gate() != 0, events[-1].kept[name])
    if unit == "components":
        assert {event.num_kept for event in events} == {2 * len(controller.layers)}


def test_an_adapter_that_has_not_moved_gives_nothing_to_move_by():
    controller = make_controller(shaken=False)
    for step in range(1, 6):
        controller.after_optimizer_step(step)
    with pytest.raises(RankFailedError, match="all scores are 0, so there is nothing to select by"):
        controller.after_optimizer_step(6)


def test_nothing_is_moved_before_the_warmup_ends():
    schedule = BudgetSchedule(total_steps=12, num_layers=1, initial_rank=2, target_rank=2, interval=2)
    assert [step for step in schedule.prune_steps if schedule.in_warmup(step)] == [1]
    assert not any(map(schedule.in_warmup, range(2, 13)))


def test_new_components_depend_on_seed_layer_and_event_only():
    found = []
    for seed, disturbance in ((1, 0), (1, 5), (2, 0)):
        controller = make_controller(seed=seed)
        torch.manual_seed(disturbance)
        event = None
        for step in range(1, 7):
            event = controller.after_optimizer_step(step)
        found.append(
            {
                name: layer.lora_a[event.kept[name] & (torch.arange(5) >= 2)].detach().clone()
                for name, layer in controller.layers.items()
            }
        )
    rows = [torch.cat([part.flatten() for part in parts.values()]) for parts in found]
    assert rows[0].numel() > 0
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    new = [part for part in found[0].values() if len(part)]
    assert not any(torch.equal(one, other) for n, one in enumerate(new) for other in new[:n])


def test_no_layer_falls_below_its_minimum():
    controller = make_controller("components", min_rank=1)
    events = [event for step in range(1, 41) if (event := controller.after_optimizer_step(step))]
    assert min(min(event.ranks.values()) for event in events) == 1
