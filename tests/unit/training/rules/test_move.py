"""The rule that moves components, in one process: what an event does to the model."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.config.pruning import LOSS_CHANGE
from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import Criterion, criterion_of
from dora_dist.training.rules.move import Move


def make_controller(
    unit: str = PARAMETERS, shaken: bool = True, importance: str = "frobenius", **options
) -> DynamicRankController:
    """Forty steps, the first event after step 6, the last one after step 20; two components in five slots."""
    model = adapt(tiny_model(), slots=5)
    layers = (shake(model) if shaken else model).adapted_layers()
    schedule = BudgetSchedule(total_steps=40, num_layers=len(layers), initial_rank=2, target_rank=2, interval=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(schedule, component_costs(shapes, unit))
    rule = Move(layers, budget, **{"num_moved": 4, "seed": 1, **options})
    criterion = criterion_of(importance, list(dict(sorted(layers.items())).values()), 0.9, 0)
    return DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=rule)


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
    rule = Move({}, Budget(schedule, {"layer": 1}), num_moved=1)
    assert [step for step in range(1, 13) if rule.is_due(step)] == schedule.prune_steps[1:]


class OnesEveryStep(Criterion):
    """1 for every component and step since the last event, as gate sensitivity sums; remembers what events used."""

    def __init__(self, num_components: int, at_events_only: bool) -> None:
        self.scores = torch.zeros(num_components, dtype=torch.float64)
        self.at_events_only = at_events_only
        self.updates = 0
        self.used: list[float] = []

    def update(self, agreement: Agreement) -> None:
        self.updates += 1
        self.scores += 1

    def after_event(self) -> None:
        self.used.append(float(self.scores[0]))
        self.scores.zero_()


@pytest.mark.parametrize("at_events_only", [False, True])
def test_the_first_move_judges_by_all_steps_before_it_where_the_warmup_ends_between_two_steps(at_events_only):
    layers = adapt(tiny_model(), slots=5).adapted_layers()
    # The warm-up ends after 1.8 steps; t = 0 in steps 1 and 2.
    schedule = BudgetSchedule(total_steps=12, num_layers=len(layers), initial_rank=2, target_rank=2, interval=2)
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    criterion = OnesEveryStep(5 * len(layers), at_events_only)
    rule = Move(layers, budget, num_moved=4, seed=1)
    controller = DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=rule)
    events = [event for step in range(1, 13) if (event := controller.after_optimizer_step(step))]
    assert [event.step for event in events] == [2, 4, 6]
    assert all(event.returned > 0 for event in events)
    assert criterion.used == ([1, 1, 1] if at_events_only else [2, 2, 2])
    assert criterion.updates == (3 if at_events_only else 6)


@pytest.mark.parametrize("importance", ["magnitude", LOSS_CHANGE])
def test_a_component_in_a_used_slot_has_no_score_of_its_predecessor(importance):
    controller = make_controller(importance=importance)
    for step in range(1, 6):
        controller.after_optimizer_step(step)
    # As after many moves: components that are gone have left a score in every slot.
    controller.criterion.scores.copy_(torch.arange(1.0, 1 + len(controller.criterion.scores)))
    before = dict(controller.kept)
    left = {name: scores.clone() for name, scores in controller.scores.items()}
    assert controller.after_optimizer_step(6).returned > 0
    saved = controller.state_dict()
    for name, scores in controller.scores.items():
        new = controller.kept[name] & ~before[name]
        assert torch.equal(saved[f"{name}.scores"], scores)
        assert not scores[new].any()
        assert scores[~new].all()
        assert importance != LOSS_CHANGE or torch.equal(scores[~new], left[name][~new])


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
