"""What components are judged by while training runs."""

import weakref

import pytest
import torch
from support.tiny_models import adapt, loss_and_gradients, shake, tiny_model, tokens

from dora_dist.config.pruning import GATE_SENSITIVITY, GROW, LOSS_CHANGE
from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.growing import ModuleScores
from dora_dist.method.importance import component_magnitudes, weight_criterion
from dora_dist.method.schedule import BudgetSchedule, GrowthSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import (
    Criterion,
    GateSensitivity,
    LayerSensitivity,
    LossChange,
    SmoothedScores,
    criterion_of,
    parameters_of,
)
from dora_dist.training.rules.grow import Grow
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.rule import Rule


@pytest.fixture
def model():
    model = shake(adapt(tiny_model(), initial_rank=3))
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.train()


def layers_of(model):
    return list(model.adapted_layers().values())


def parts(model):
    return [(layer.lora_a, layer.gate, layer.lora_b) for layer in layers_of(model)]


def gates_of(model):
    return [layer.gate for layer in model.adapted_layers().values()]


def test_sensitivity_is_gate_times_gradient_of_the_whole_step_summed_over_steps(model):
    gates = gates_of(model)
    criterion = GateSensitivity(gates)
    expected = torch.zeros_like(criterion.scores)
    for step in range(3):
        gradient = torch.zeros_like(expected)
        for micro_batch in range(2):
            model.zero_grad()
            ids = tokens(seed=10 * step + micro_batch)
            model(input_ids=ids, labels=ids).loss.backward()
            gradient += torch.cat([gate.grad for gate in gates])
        for gate in gates:  # as an optimizer would, by so much that the order is seen
            gate.data -= 10 * gate.grad
        expected += (torch.cat(gates).detach() * gradient).abs()
        criterion.update(Agreement())
    torch.testing.assert_close(criterion.scores, expected, rtol=1e-5, atol=1e-9)
    criterion.after_event()
    assert not criterion.scores.any()


def test_it_is_the_first_order_effect_of_removing_a_component(model):
    gates = gates_of(model)
    criterion = GateSensitivity(gates)
    ids = tokens()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    criterion.update(Agreement())
    layer, component, share = 4, 1, 0.01
    gate = gates[layer].data[component].clone()
    losses = []
    for factor in (1 + share, 1 - share):  # the loss is float32 in transformers, so that the share cannot be tiny
        gates[layer].data[component] = factor * gate
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
    effect = abs(losses[0] - losses[1]) / (2 * share)
    assert effect == pytest.approx(float(criterion.scores[3 * layer + component]), rel=5e-3)


def test_the_hooks_do_not_change_the_gradients(model):
    _, expected = loss_and_gradients(model)
    GateSensitivity(gates_of(model))
    LossChange(layers_of(model))
    for _ in range(2):
        _, found = loss_and_gradients(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_whose_gradient_is_not_finite_does_not_count(model):
    criterion = GateSensitivity(gates_of(model))
    ids = tokens()
    (model(input_ids=ids, labels=ids).loss * torch.inf).backward()
    criterion.update(Agreement())
    assert not criterion.scores.any()
    model(input_ids=ids, labels=ids).loss.backward()
    criterion.update(Agreement())
    assert torch.isfinite(criterion.scores).all()
    assert criterion.scores.any()


def step_down(model, rate=0.01):
    """As an optimizer would."""
    for part in (one for layer in parts(model) for one in layer):
        if part.grad is not None:
            part.data -= rate * part.grad
            part.grad = None


@pytest.mark.parametrize("trained_gates", [True, False])
def test_loss_change_is_gradient_times_movement_by_component_summed_over_steps(model, trained_gates):
    for gate in gates_of(model):
        gate.requires_grad_(trained_gates)
    criterion = LossChange(layers_of(model))
    expected = torch.zeros_like(criterion.scores)
    for step in range(3):
        gates_of(model)[0].data[step] = 0  # between two steps, as an event does: no step's doing
        before = [[part.detach().clone() for part in layer] for layer in parts(model)]
        for micro_batch in range(2):
            ids = tokens(seed=10 * step + micro_batch)
            model(input_ids=ids, labels=ids).loss.backward()
        gradients = [[torch.zeros(()) if part.grad is None else part.grad for part in layer] for layer in parts(model)]
        step_down(model)
        by_component = []
        for now, old, gradient in zip(parts(model), before, gradients, strict=True):
            a, c, b = ((new - was) * slope for new, was, slope in zip(now, old, gradient, strict=True))
            by_component.append(a.sum(1) + c + b.sum(0))
        expected -= torch.cat(by_component).detach()
        criterion.update(Agreement())
    torch.testing.assert_close(criterion.scores, expected, rtol=1e-6, atol=1e-12)
    criterion.after_event()  # the sum goes on
    torch.testing.assert_close(criterion.scores, expected, rtol=1e-6, atol=1e-12)


def test_loss_change_adds_up_to_the_drop_of_the_loss(model):
    criterion = LossChange(layers_of(model))
    ids, losses = tokens(), []
    for _ in range(21):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        step_down(model, 0.01)
        criterion.update(Agreement())
    # The last step's part has no loss after it.
    drop, last = losses[0] - losses[-1], losses[-2] - losses[-1]
    assert drop > 0.03
    assert float(criterion.scores.sum()) == pytest.approx(drop + last, rel=0.05)


def test_a_step_whose_product_is_not_finite_changes_no_loss(model):
    criterion = LossChange(layers_of(model))
    ids = tokens()
    (model(input_ids=ids, labels=ids).loss * torch.inf).backward()
    criterion.update(Agreement())
    assert not criterion.scores.any()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    step_down(model)
    criterion.update(Agreement())
    assert torch.isfinite(criterion.scores).all()
    assert criterion.scores.sum() > 0


@pytest.mark.parametrize(("kind", "lacking"), [(Criterion, "update"), (Rule, "apply, select")])
def test_a_criterion_or_rule_that_lacks_what_it_must_have_is_not_made(kind, lacking):
    with pytest.raises(TypeError, match=lacking.replace(", ", "'?, '?")):
        type("Lacking", (kind,), {})()


def test_new_components_have_no_sum_over_steps(model):
    for criterion in (GateSensitivity(gates_of(model)), LossChange(layers_of(model))):
        with pytest.raises(ValueError, match=f"{type(criterion).__name__} has no score for components"):
            criterion.rescore()


def test_scores_of_weights_are_smoothed_from_0(model):
    criterion = SmoothedScores(component_magnitudes, 0.75, layers_of(model))
    now = component_magnitudes(parameters_of(layers_of(model))).flatten()
    criterion.update(Agreement())
    torch.testing.assert_close(criterion.scores, 0.25 * now)
    criterion.update(Agreement())
    torch.testing.assert_close(criterion.scores, (0.75 * 0.25 + 0.25) * now)


@pytest.mark.parametrize("importance", ["frobenius", "magnitude", "squared_magnitude"])
def test_a_component_has_the_score_that_it_had_where_its_layer_loses_others_and_follows_in_scale(importance):
    model = shake(adapt(tiny_model(), initial_rank=3, scale="sqrt_rank"))
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    layers = list(model.adapted_layers().values())
    layers[1].gate.data[1:] = 0  # nothing to lose but the scale, so that no sum of the layer changes
    score = weight_criterion(importance, 0)
    update = layers[1].scale * layers[1].gate[0] * torch.outer(layers[1].lora_b[:, 0], layers[1].lora_a[0])
    before, scale = score(parameters_of(layers)), layers[1].scale
    set_mask(layers[1], torch.tensor([True, False, False]))
    assert layers[1].scale != scale
    torch.testing.assert_close(
        layers[1].scale * layers[1].gate[0] * torch.outer(layers[1].lora_b[:, 0], layers[1].lora_a[0]), update
    )
    torch.testing.assert_close(score(parameters_of(layers)), before, rtol=1e-12, atol=0)


def test_the_magnitude_of_a_component_is_the_norm_of_what_it_adds_to_its_layer():
    model = shake(adapt(tiny_model(), initial_rank=3, scale="sqrt_rank"))
    layers = list(model.adapted_layers().values())
    set_mask(layers[0], torch.tensor([True, True, False]))
    found = component_magnitudes(parameters_of(layers[:2]))
    for layer, scores in zip(layers, found, strict=False):
        columns = layer.lora_b.double() * layer.effective_gate().double() * layer.scale
        norms = [torch.outer(columns[:, one], layer.lora_a[one].double()).norm() for one in range(3)]
        torch.testing.assert_close(scores, torch.stack(norms), rtol=1e-12, atol=0)


@pytest.mark.parametrize("importance", ["sensitivity", "weights"])
def test_an_event_without_anything_to_select_by_ends_the_run(importance):
    """Steps that were all left out, say: a selection would be by the names of the layers alone."""
    model = adapt(tiny_model(), initial_rank=3)  # b is 0, and stays so
    layers = model.adapted_layers()
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=3, target_rank=2, interval=2)
    criterion = GateSensitivity([layer.gate for layer in layers.values()]) if importance == "sensitivity" else None
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    controller = DynamicRankController(layers, budget, Agreement(), criterion=criterion)
    controller.after_optimizer_step(1)
    controller.after_optimizer_step(2)
    controller.after_optimizer_step(3)
    with pytest.raises(RankFailedError, match="all scores are 0"):
        controller.after_optimizer_step(4)


def test_a_budget_in_parameters_is_met_by_the_run_to_within_one_component():
    layers = shake(adapt(tiny_model(), initial_rank=3)).adapted_layers()
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=3, target_rank=2, interval=2)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    controller = DynamicRankController(layers, Budget(schedule, component_costs(shapes, PARAMETERS)), Agreement())
    events = [controller.after_optimizer_step(step) for step in range(1, 11)]
    controller.finish()
    last = [event for event in events if event is not None][-1]
    widths = [layer.in_features + layer.out_features for layer in layers.values()]
    kept = [int(layer.component_mask.sum()) for layer in layers.values()]
    spent = sum(rank * width for rank, width in zip(kept, widths, strict=True))
    assert 0 <= 2 * sum(widths) - spent < max(widths)
    assert last.num_parameters == spent
    assert last.num_kept == sum(kept)


def test_layers_are_judged_by_their_smoothed_sensitivity_times_how_much_it_varies(model):
    gates = gates_of(model)
    criterion, twin = LayerSensitivity(gates), GateSensitivity(gates)
    expected = ModuleScores.start(len(gates))
    for step in range(4):
        model.zero_grad()
        ids = tokens(seed=step)
        (model(input_ids=ids, labels=ids).loss * (torch.nan if step == 2 else 1)).backward()
        for one in (criterion, twin):
            one.update(Agreement())
        if step != 2:  # of which no gradient is finite
            expected = expected.after(twin.scores.view(len(gates), 3).sum(1))
        twin.after_event()
        criterion.after_event()
    assert torch.equal(criterion.scores.view(len(gates), 3), expected.scores[:, None].expand(-1, 3))
    assert criterion.state.keys() == {"sensitivity", "uncertainty"}
    with pytest.raises(ValueError, match="LayerSensitivity has no score for components"):
        criterion.rescore()


def test_what_a_criterion_and_a_rule_remember_is_in_the_state_of_a_checkpoint():
    def make():
        layers = shake(adapt(tiny_model(), initial_rank=1, target_rank=2, slots=3)).adapted_layers()
        schedule = GrowthSchedule(total_steps=10, num_layers=len(layers), initial_rank=1, target_rank=2, interval=2)
        budget, gates = Budget(schedule, dict.fromkeys(layers, 1)), [layer.gate for layer in layers.values()]
        return DynamicRankController(
            layers, budget, Agreement(), criterion=LayerSensitivity(gates), rule=Grow(layers, budget, warmup=2)
        )

    first, second = make(), make()
    first.criterion.state["sensitivity"].uniform_(generator=torch.Generator().manual_seed(1))
    first.rule.state["granted"][2] = 4
    saved = first.state_dict()
    second.load_state_dict(saved, 4)
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in saved.items())
    assert second.rule.state["granted"][2] == 4
    with pytest.raises(RankFailedError, match="does not fit the model: KeyError\\('rule/granted'\\)"):
        make().load_state_dict({name: tensor for name, tensor in saved.items() if name != "rule/granted"}, 4)


OBSERVING = [GATE_SENSITIVITY, LOSS_CHANGE, GROW]


def observed_run(observer):
    """A model and its controller, with a criterion that observes gradients, for 12 steps."""
    grows = observer == GROW
    start = {"initial_rank": 1, "slots": 3} if grows else {"initial_rank": 3}
    model = shake(adapt(tiny_model(), target_rank=2, **start)).train()
    layers = model.adapted_layers()
    kind = GrowthSchedule if grows else BudgetSchedule
    schedule = kind(
        total_steps=12, num_layers=len(layers), initial_rank=start["initial_rank"], target_rank=2, interval=2
    )
    budget = Budget(schedule, dict.fromkeys(layers, 1))
    criterion = LayerSensitivity(gates_of(model)) if grows else criterion_of(observer, layers_of(model), 0.0, 0)
    rule = Grow(layers, budget, warmup=2) if grows else None
    return model, DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=rule)


def take_steps(model, controller, steps):
    for step in steps:
        for micro_batch in range(2):
            ids = tokens(seed=10 * step + micro_batch)
            model(input_ids=ids, labels=ids).loss.backward()
        step_down(model)
        controller.after_optimizer_step(step)


def hooks_of(model):
    return [hook for one in model.parameters() for hook in (one._backward_hooks or {}).values()]


@pytest.mark.parametrize("observer", OBSERVING)
def test_nothing_is_observed_after_the_final_event(observer):
    model, controller = observed_run(observer)
    observing = hooks_of(model)
    assert observing
    take_steps(model, controller, range(1, controller.schedule.final_step))
    assert hooks_of(model) == observing
    take_steps(model, controller, [controller.schedule.final_step])
    assert hooks_of(model) == []
    before = controller.state_dict()
    take_steps(model, controller, range(controller.schedule.final_step + 1, 13))
    controller.finish()
    after = controller.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("observer", OBSERVING)
def test_a_run_that_resumes_after_the_final_event_observes_nothing(observer):
    model, controller = observed_run(observer)
    final = controller.schedule.final_step
    for begin, end in ((1, final), (final, final + 2)):
        take_steps(model, controller, range(begin, end))
        resumed, its = observed_run(observer)
        resumed.load_state_dict(model.state_dict(), strict=False)  # the adapter's alone
        its.load_state_dict(controller.state_dict(), end - 1)
        assert bool(hooks_of(resumed)) == (end == final)
    take_steps(model, controller, range(final + 2, 13))
    take_steps(resumed, its, range(final + 2, 13))
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("observer", OBSERVING)
def test_the_end_of_the_observation_changes_nothing_of_the_run(observer):
    model, controller = observed_run(observer)
    other, its = observed_run(observer)
    its.criterion.end = lambda: None
    take_steps(model, controller, range(1, 13))
    take_steps(other, its, range(1, 13))
    assert hooks_of(other)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(tensor, its.state_dict()[name]) for name, tensor in controller.state_dict().items())


def test_what_loss_change_has_copied_of_the_parameters_goes_with_the_final_event(model):
    criterion = LossChange(layers_of(model))
    copies = [weakref.ref(move) for _, moves in criterion._moves for move in moves]
    assert len(copies) == 3 * len(parts(model))
    criterion.end()
    assert all(copy() is None for copy in copies)
