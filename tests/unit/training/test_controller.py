"""The method in one process: what ends in an error, and what comes back."""

import pytest
import torch
from support.tiny_models import adapt, shake, tiny_model

from dora_dist.config.pruning import Selection
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import Budget
from dora_dist.method.importance import score_layers
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import BudgetMissedError, DynamicRankController, NonFiniteAdapterError
from dora_dist.training.criterion import SmoothedScores


def make_controller(total_steps=10, target_rank=2, **options):
    layers = shake(adapt(tiny_model(), initial_rank=3, target_rank=target_rank)).adapted_layers()
    schedule = BudgetSchedule(
        total_steps=total_steps, num_layers=len(layers), initial_rank=3, target_rank=target_rank, interval=2
    )
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    return DynamicRankController(layers, budget, Agreement(), selection=Selection(**options))


def test_a_run_that_ends_before_the_final_event_is_an_error():
    controller = make_controller()
    controller.after_optimizer_step(1)
    with pytest.raises(BudgetMissedError, match="ended at step 1 before the final pruning event of step 5"):
        controller.finish()


def test_a_run_that_missed_its_budget_is_an_error():
    controller = make_controller()
    for step in range(1, 11):
        controller.after_optimizer_step(step)
    controller.finish()
    next(iter(controller.layers.values())).component_mask.fill_(True)
    with pytest.raises(BudgetMissedError, match="are left instead of the budget 28"):
        controller.finish()


def test_no_component_comes_back_without_regrowth_and_some_may_with_it():
    for regrow in (False, True):
        controller = make_controller(total_steps=40, target_rank=1, regrow=regrow)
        controller.criterion = SmoothedScores(score_layers, 0.0, 42, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        returned = 0
        for step in range(1, 41):
            for layer in controller.layers.values():  # an optimizer that throws the gates about
                layer.gate.data.copy_(torch.randn(3, generator=generator))
            event = controller.after_optimizer_step(step)
            returned += event.returned if event is not None else 0
        assert (returned > 0) == regrow


def test_a_step_that_was_not_seen_is_an_error():
    controller = make_controller()
    controller.after_optimizer_step(1)
    with pytest.raises(AssertionError, match="step 3 after step 1"):
        controller.after_optimizer_step(3)


def test_bounds_that_cannot_be_met_are_refused_before_the_run():
    with pytest.raises(ValueError, match="cannot keep 28 of 42 components"):
        make_controller(max_rank=1)


def test_the_penalty_ends_with_the_final_event():
    controller = make_controller()
    for step in range(1, 6):
        assert controller.penalty() is not None, step
        event = controller.after_optimizer_step(step)
    assert event.final
    assert controller.penalty() is None


def test_pruned_gates_are_zero_after_every_event():
    controller = make_controller(total_steps=40)
    for step in range(1, 41):
        event = controller.after_optimizer_step(step)
        if event is not None:
            alive = sum(int((layer.effective_gate() != 0).sum()) for layer in controller.layers.values())
            assert alive == event.num_kept == controller.schedule.num_components - controller.schedule.num_pruned(step)
            assert sum(event.ranks.values()) == event.num_kept


def test_a_bound_on_ranks_is_refused_where_nothing_may_come_back():
    with pytest.raises(ValueError, match="max_rank is 2 and regrow is false"):
        make_controller(max_rank=2, regrow=False)


def test_an_adapter_that_is_not_finite_is_not_saved():
    controller = make_controller()
    controller.check_finite()
    next(iter(controller.layers.values())).lora_b.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteAdapterError, match=r"step 0: the adapter of model\.layers\.0"):
        controller.check_finite()
