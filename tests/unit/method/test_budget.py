"""Budgets counted in parameters."""

import pytest
import torch

from dora_dist.method.budget import Budget, component_costs
from dora_dist.method.schedule import BudgetSchedule

SHAPES = {"q": (8, 8), "down": (24, 8), "up": (8, 24)}


def budget(unit: str) -> Budget:
    schedule = BudgetSchedule(total_steps=40, num_layers=3, initial_rank=6, target_rank=4, interval=2)
    return Budget(schedule, component_costs(SHAPES, unit))


def test_the_final_budget_in_parameters_is_that_of_uniform_lora_of_the_target_rank():
    counted = budget("parameters")
    assert counted.final == sum(4 * sum(shape) for shape in SHAPES.values())
    assert counted.initial == sum(6 * sum(shape) for shape in SHAPES.values())
    assert counted.at(1) == counted.initial
    assert counted.at(counted.schedule.final_step) == counted.at(40) == counted.final


def test_in_components_it_is_the_schedule():
    counted = budget("components")
    for step in range(1, 41):
        assert counted.at(step) == counted.schedule.num_components - counted.schedule.num_pruned(step)


def test_a_budget_is_met_to_within_one_component():
    counted = budget("parameters")  # a component of q costs 16, the others 32, 320 in all
    assert counted.is_met_by({"q": 4, "down": 4, "up": 4})
    assert counted.is_met_by({"q": 5, "down": 4, "up": 3})  # 16 left
    assert not counted.is_met_by({"q": 4, "down": 4, "up": 3})  # one of up's would fit
    assert not counted.is_met_by({"q": 5, "down": 4, "up": 4})  # 16 too many


def test_every_event_spends_its_budget_to_within_one_component():
    counted = budget("parameters")
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(6, generator=generator) for name in SHAPES}
    for step in counted.schedule.prune_steps:
        ranks = {name: int(mask.sum()) for name, mask in counted.select(scores, step).items()}
        assert 0 <= counted.at(step) - counted.spent(ranks) < 32
    assert counted.is_met_by(ranks)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="budget_unit is 'layers', but must be components or parameters"):
        component_costs(SHAPES, "layers")
