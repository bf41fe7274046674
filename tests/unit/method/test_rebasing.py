"""Components as singular vectors: the same update, other components."""

import pytest
import torch
from support.tiny_models import adapt, logits, shake, tiny_model

from dora_dist.config.pruning import Selection
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import Budget
from dora_dist.method.importance import squared_magnitudes
from dora_dist.method.rebasing import singular_components
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import GateSensitivity, SmoothedScores
from dora_dist.training.rules.prune import Prune


def components(rank=4, inputs=9, outputs=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = ((rank, inputs), (rank,), (outputs, rank))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def update(lora_a, gate, lora_b):
    return (lora_b.double() * gate.double()) @ lora_a.double()


def test_the_update_is_the_same_and_its_components_are_its_singular_vectors():
    parts = components()
    lora_a, gate, lora_b = singular_components(*parts)
    torch.testing.assert_close(update(lora_a, gate, lora_b), update(*parts), rtol=1e-12, atol=1e-12)
    norms = lora_a.norm(dim=1) * lora_b.norm(dim=0)
    torch.testing.assert_close(norms, torch.linalg.svdvals(update(*parts))[:4], rtol=1e-12, atol=1e-12)
    for gram in (lora_a @ lora_a.T, lora_b.T @ lora_b):
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
    root_mean_square = parts[0].square().sum(1).mean().sqrt()
    torch.testing.assert_close(lora_a.norm(dim=1), root_mean_square.expand(4), rtol=1e-12, atol=0)
    assert torch.equal(gate, torch.ones(4, dtype=torch.float64))


def test_it_is_a_fixed_point_so_that_a_second_event_changes_nothing():
    once = singular_components(*components())
    for first, second in zip(once, singular_components(*once), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dead", ["gate", "b"])
def test_where_the_rank_is_lower_a_component_can_still_grow(dead):
    lora_a, gate, lora_b = components()
    (gate if dead == "gate" else lora_b.T)[1] = 0
    new_a, new_gate, new_b = singular_components(lora_a, gate, lora_b)
    torch.testing.assert_close(update(new_a, new_gate, new_b), update(lora_a, gate, lora_b), rtol=1e-12, atol=1e-12)
    assert float(new_b[:, 3].norm()) < 1e-12
    torch.testing.assert_close(new_a[3].norm(), new_a[0].norm())
    assert torch.isfinite(new_a).all()


def test_an_update_of_zero_is_a_start_like_loras():
    lora_a, gate, lora_b = components()
    new_a, new_gate, new_b = singular_components(lora_a, gate, torch.zeros_like(lora_b))
    assert not new_b.any()
    assert torch.linalg.matrix_rank(new_a) == 4
    assert torch.equal(new_gate, torch.ones_like(new_gate))


def test_more_components_than_singular_vectors_are_refused():
    with pytest.raises(ValueError, match="cannot turn 8 components of a layer with 9 inputs and 7 outputs"):
        singular_components(*components(rank=8))


def make_controller(layers, **options):
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=4, target_rank=2, interval=2)
    criterion = SmoothedScores(squared_magnitudes, 0.9, layers.values())
    budget, selection = Budget(schedule, dict.fromkeys(layers, 1)), Selection(rebase=True, **options)
    return DynamicRankController(
        layers, budget, Agreement(), criterion=criterion, rule=Prune(layers, budget, selection)
    )


def test_an_event_that_prunes_nothing_leaves_the_model_as_it_is():
    model = shake(adapt(tiny_model(), initial_rank=4)).eval()
    layers = model.adapted_layers()
    controller = make_controller(layers)
    before, old = logits(model), next(iter(layers.values())).lora_a.clone()
    assert controller.after_optimizer_step(1).num_kept == 4 * len(layers)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(next(iter(layers.values())).lora_a, old)


@pytest.mark.parametrize("regrow", [True, False])
def test_what_is_kept_is_the_best_approximation_of_what_there_was(regrow):
    """No selection of so many singular vectors of all layers has more of the squared norm."""
    layers = shake(adapt(tiny_model(), initial_rank=4)).adapted_layers()
    controller = make_controller(layers, regrow=regrow)
    for step in range(1, 5):
        controller.after_optimizer_step(step)
    updates = {name: update(layer.lora_a, layer.effective_gate(), layer.lora_b) for name, layer in layers.items()}
    event = controller.after_optimizer_step(5)
    assert event.final
    squares = torch.cat([torch.linalg.svdvals(matrix.detach())[:4].square() for matrix in updates.values()])
    left = 0.0
    for name, layer in layers.items():
        kept = update(layer.lora_a, layer.effective_gate(), layer.lora_b)
        left += float((kept - updates[name]).detach().square().sum())
    best = float(squares.sort().values[: len(squares) - event.num_kept].sum())
    assert left == pytest.approx(best, rel=1e-4)


def test_sensitivity_cannot_judge_components_that_an_event_makes():
    layers = adapt(tiny_model(), initial_rank=4).adapted_layers()
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=4, target_rank=2)
    criterion = GateSensitivity([layer.gate for layer in layers.values()])
    budget, selection = Budget(schedule, dict.fromkeys(layers, 1)), Selection(rebase=True)
    with pytest.raises(ValueError, match=r"set pruning\.rebase to false"):
        DynamicRankController(layers, budget, Agreement(), criterion=criterion, rule=Prune(layers, budget, selection))
