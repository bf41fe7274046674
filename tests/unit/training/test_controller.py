"""The method in one process: what ends in an error, and what comes back."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.config.pruning import Selection
from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.importance import score_layers
from dora_dist.method.schedule import BudgetSchedule, FixedRanks
from dora_dist.runs.records import RecordedEvent
from dora_dist.training.controller import BudgetMissedError, DynamicRankController, NonFiniteAdapterError
from dora_dist.training.criterion import SmoothedScores
from dora_dist.training.rules.prune import Prune


def make_controller(total_steps=10, target_rank=2, model=None, **options):
    model = model or shake(adapt(tiny_model(), initial_rank=3, target_rank=target_rank))
    layers = model.adapted_layers()
    schedule = BudgetSchedule(
        total_steps=total_steps, num_layers=len(layers), initial_rank=3, target_rank=target_rank, interval=2
    )
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    return DynamicRankController(layers, budget, Agreement(), rule=Prune(layers, budget, Selection(**options)))


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
        controller.criterion = SmoothedScores(score_layers, 0.0, controller.layers.values())
        generator = torch.Generator().manual_seed(0)
        returned = 0
        for step in range(1, 41):
            for layer in controller.layers.values():  # an optimizer that throws the gates about
                layer.gate.data.copy_(torch.randn(3, generator=generator))
            event = controller.after_optimizer_step(step)
            returned += event.returned if event is not None else 0
        assert (returned > 0) == regrow


def test_nothing_pruned_competes_for_the_budget_where_no_gate_is_trained():
    model = shake(adapt(tiny_model(), initial_rank=3, target_rank=1, train_gates=False))
    layers = model.adapted_layers()
    schedule = BudgetSchedule(total_steps=40, num_layers=len(layers), initial_rank=3, target_rank=1, interval=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(schedule, component_costs(shapes, PARAMETERS))
    generator = torch.Generator().manual_seed(0)

    def score(parts):  # what has gone may be first in the next event
        return torch.rand(len(parts), 3, generator=generator)

    criterion = SmoothedScores(score, 0.0, dict(sorted(layers.items())).values())
    controller = DynamicRankController(layers, budget, Agreement(), criterion=criterion)
    events = [event for step in range(1, 41) if (event := controller.after_optimizer_step(step))]
    controller.finish()
    assert len(events) > 5
    assert [event.returned for event in events] == [0] * len(events)
    for name, layer in layers.items():
        assert torch.equal(layer.effective_gate() != 0, controller.kept[name])


def test_a_step_that_was_not_seen_is_an_error():
    controller = make_controller()
    controller.after_optimizer_step(1)
    with pytest.raises(AssertionError, match="step 3 after step 1"):
        controller.after_optimizer_step(3)


def test_what_goes_wrong_while_scoring_is_printed_with_its_traceback(capsys):
    def score(layers):
        return layers[0].no_such_thing

    controller = make_controller()
    controller.criterion = SmoothedScores(score, 0.0, controller.layers.values())
    with pytest.raises(RankFailedError, match=r"AttributeError after step 1: .*no_such_thing"):
        controller.after_optimizer_step(1)
    printed = capsys.readouterr().err
    assert "return layers[0].no_such_thing" in printed
    assert printed.count("Traceback") == 1


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


def test_an_event_says_what_every_layer_scored_on_average_before_it():
    controller = make_controller(regrow=False)
    empty, half, *_ = controller.layers.values()
    empty.component_mask.fill_(False)
    half.component_mask[0] = False
    event = next(found for step in range(1, 3) if (found := controller.after_optimizer_step(step)))
    scores = controller.scores
    names = list(controller.layers)
    expected = {name: float(scores[name].mean()) for name in names}
    expected |= {names[0]: 0.0, names[1]: float(scores[names[1]][1:].mean())}
    assert event.scores == pytest.approx(expected)
    assert len(set(expected.values())) > 2
    assert RecordedEvent.of(event).scores == event.scores


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


@pytest.mark.parametrize("regrow", [True, False])
def test_the_scale_by_rank_leaves_the_model_what_it_computes_at_events(regrow):
    config = {"initial_rank": 3, "target_rank": 1, "alpha": 6.0, "scale": "sqrt_rank"}
    model = shake(adapt(tiny_model(), **config))
    controller = make_controller(target_rank=1, model=model, regrow=regrow)
    same = shake(adapt(tiny_model(), **config))
    for layer in controller.layers.values():
        assert layer.scale == 6 / 3**0.5
    for step in range(1, 11):
        event = controller.after_optimizer_step(step)
        if event is not None:  # the same components in a model that no event has come to
            for name, layer in same.adapted_layers().items():
                layer.gate.data.masked_fill_(~event.kept[name], 0)
    torch.testing.assert_close(logits(model), logits(same))
    kept = controller.ranks
    assert len(set(kept.values())) > 1
    for name, layer in controller.layers.items():
        if kept[name]:
            assert layer.scale == 6 / kept[name] ** 0.5

    resumed = make_controller(
        target_rank=1, model=adapt(tiny_model(), initial_rank=3, target_rank=1, alpha=6.0, scale="sqrt_rank")
    )
    for name, layer in resumed.layers.items():
        for parameter in ("lora_a", "gate", "lora_b"):
            getattr(layer, parameter).data.copy_(getattr(controller.layers[name], parameter))
    resumed.load_state_dict(controller.state_dict(), 10)
    assert [layer.scale for layer in resumed.layers.values()] == [layer.scale for layer in controller.layers.values()]


def test_ranks_that_stay_have_one_event_before_the_first_step_and_none_later():
    model = shake(adapt(tiny_model(), target_rank=2, ranks="rising-with-depth"))
    ranks = {name: len(layer.gate) for name, layer in model.adapted_layers().items()}
    assert len(set(ranks.values())) > 1
    budget = Budget(FixedRanks(ranks), dict.fromkeys(ranks, 3))
    controller = DynamicRankController(model.adapted_layers(), budget, Agreement())
    event = controller.before_first_step()
    assert (event.step, event.final, event.ranks) == (0, True, ranks)
    before = model.folded_factors()
    assert controller.penalty() is None
    assert [controller.after_optimizer_step(step) for step in range(1, 11)] == [None] * 10
    controller.finish()
    after = model.folded_factors()
    assert all(torch.equal(*pair) for name in before for pair in zip(before[name], after[name], strict=True))
    assert controller.num_kept == sum(ranks.values()) == budget.final // 3


def test_what_is_pruned_has_no_event_before_the_first_step():
    assert make_controller().before_first_step() is None
