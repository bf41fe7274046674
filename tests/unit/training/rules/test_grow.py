"""The rule that grows, in one process: what an event does to the model, and how fast what is new learns."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import Moments
from dora_dist.method.budget import COMPONENTS, PARAMETERS, Budget, component_costs
from dora_dist.method.schedule import GrowthSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.rules.grow import RESERVE_GATE, Grow

SLOTS = 5


def make(unit: str = COMPONENTS, warmup: int = 2, **adapter):
    """A model whose only component is random, and its controller: forty steps, events after steps 6, 8, ... 20."""
    model = shake(adapt(tiny_model(), **{"initial_rank": 1, "target_rank": 3, "slots": SLOTS, **adapter}))
    layers = model.adapted_layers()
    for layer in layers.values():
        layer.lora_b.data[:, 1:] = 0  # as the start has it
    schedule = GrowthSchedule(total_steps=40, num_layers=len(layers), initial_rank=1, target_rank=3, interval=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(schedule, component_costs(shapes, unit))
    return model, DynamicRankController(layers, budget, Agreement(), rule=Grow(layers, budget, warmup))


@pytest.mark.parametrize("scale", ["constant", "sqrt_rank"])
def test_a_reserve_begins_beside_what_counts_and_changes_nothing(scale):
    model = shake(adapt(tiny_model(), initial_rank=1, target_rank=3, slots=SLOTS, scale=scale))
    for layer in model.adapted_layers().values():
        layer.lora_b.data[:, 1:] = 0
    before = logits(model)
    model, controller = make(scale=scale)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=0 if scale == "constant" else 1e-5)
    assert controller.num_kept == len(controller.layers)
    for name, layer in controller.layers.items():
        assert controller.kept[name].tolist() == [True, False, False, False, False]
        assert layer.component_mask.tolist() == [True, True, False, False, False]
        assert layer.gate[1] == torch.tensor(RESERVE_GATE)


@pytest.mark.parametrize("unit", [COMPONENTS, PARAMETERS])
def test_the_budget_rises_to_what_a_uniform_target_rank_costs(unit):
    _, controller = make(unit)
    assert controller.penalty() is None
    events = [event for step in range(1, 41) if (event := controller.after_optimizer_step(step))]
    controller.finish()
    largest = max(controller.budget.costs.values())
    for event in events:
        assert 0 <= controller.budget.at(event.step) - controller.budget.spent(event.ranks) < largest
    assert controller.budget.is_met_by(events[-1].ranks)
    assert len(events) == 8
    assert events[0].returned == 0
    assert all(event.returned > 0 for event in events[1:])
    for name, layer in controller.layers.items():
        assert torch.equal(layer.component_mask, events[-1].kept[name])
        assert torch.equal(layer.gate != 0, events[-1].kept[name])
    if unit == COMPONENTS:
        assert events[-1].num_kept == 3 * len(controller.layers)


def test_the_function_does_not_jump_when_a_component_is_granted_and_the_last_reserves_go():
    model, controller = make()
    trained = torch.Generator().manual_seed(3)
    for step in range(1, 21):
        for layer in controller.layers.values():  # what training makes of reserves
            reserve = layer.component_mask & ~controller.kept[min(controller.kept)]
            layer.lora_b.data[:, reserve] = 0.1 * torch.randn(len(layer.lora_b), int(reserve.sum()), generator=trained)
        before = logits(model)
        event = controller.after_optimizer_step(step)
        if event is None:
            continue
        if event.final:
            assert 0 < (logits(model) - before).abs().max() < 100 * RESERVE_GATE
        else:
            assert torch.equal(logits(model), before)


def test_what_is_new_learns_at_a_rate_that_rises_and_the_gate_of_a_reserve_not_at_all():
    _, controller = make(warmup=4)
    rule, layers = controller.rule, controller.layers
    name = min(layers)
    kept = {**controller.kept, name: torch.tensor([True, True, False, False, False])}
    rule.apply(8, controller.kept, kept, None)
    assert rule.state["granted"].view(len(layers), SLOTS)[0].tolist() == [-4, 8, -4, -4, -4]

    def shares(step: int):
        return {id(parameter): share.flatten().tolist() for parameter, share in rule.rates(step, kept)}

    layer, other = layers[name], layers[max(layers)]
    first = shares(9)
    assert first[id(layer.lora_a)] == first[id(layer.lora_b)] == [1, 0.25, 1, 1, 1]
    assert first[id(layer.gate)] == [1, 0.25, 0, 1, 1]
    assert first[id(other.gate)] == [1, 0, 1, 1, 1]
    assert id(other.lora_a) not in first
    assert shares(11)[id(layer.lora_b)] == [1, 0.75, 1, 1, 1]
    assert shares(12).keys() == {id(layer.gate) for layer in layers.values()}
    assert shares(21) == {}  # after the last event there are no reserves
    rule.state["granted"].fill_(100)
    assert shares(controller.schedule.final_step + 4) == {}  # nothing can be new, and none of it is looked at


def test_a_layer_whose_slots_are_full_has_no_reserve():
    _, controller = make()
    full = {name: torch.ones_like(mask) for name, mask in controller.kept.items()}
    controller.rule.apply(8, controller.kept, full, None)
    assert list(controller.rule.rates(12, full)) == []
    assert all(layer.gate[1:].eq(RESERVE_GATE).all() for layer in controller.layers.values())


def test_shares_of_an_update_are_exact():
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    before, optimizer = parameter.detach().clone(), torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    twin = torch.nn.Parameter(before.clone())
    of_twin = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    share = torch.tensor([0.0, 0.25, 1.0])
    Moments(torch.nn.Identity(), optimizer).slow_down(lambda: [(parameter, share)])
    for one, its in ((parameter, optimizer), (twin, of_twin)):
        one.grad = torch.full_like(one, 2.0)
        its.step()
    assert torch.equal(parameter[:, 0], before[:, 0])
    assert torch.equal(parameter[:, 2], twin[:, 2])
    torch.testing.assert_close(parameter - before, share * (twin - before))
    assert torch.equal(optimizer.state[parameter]["exp_avg"], of_twin.state[twin]["exp_avg"])
