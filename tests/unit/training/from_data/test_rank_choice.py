"""Ranks from training rows against the dense gradient, on a model small enough for it."""

import copy

import pytest
import torch
from support.tiny_models import adapt, add_unreached_layer, load_base, logits, tiny_model, tokens, trainable
from torch import Tensor, nn

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.quantization import dequantized_weight
from dora_dist.base_model.recomputation import recompute_first
from dora_dist.config.adapter import GRADIENT_SPECTRUM, RANKS_FROM_DATA, WEIGHT_GRADIENT
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.ranks import groups_within
from dora_dist.method.schedule import FixedRanks
from dora_dist.method.subspaces import EXTRA_PROBES
from dora_dist.training.controller import BudgetMissedError, DynamicRankController
from dora_dist.training.from_data.passes import Rows, as_in_training
from dora_dist.training.from_data.ranks import RankChoice, choose_ranks, spectra_of_gradients, weight_gradients

SLOTS, TARGET = 6, 2
ROWS = [tokens(1, 8 + number, seed=number) for number in range(6)]
FEW = [tokens(1, SLOTS + EXTRA_PROBES, seed=7)]
"""As many tokens as there are probes: their gradients have no more singular values."""
BOTH = pytest.mark.parametrize("ranks", RANKS_FROM_DATA)


def student(base: nn.Module | None = None, fuse: bool = True, **changes: object) -> DynamicLoraModel:
    base = tiny_model() if base is None else base
    return adapt(base, fuse, **{"target_rank": TARGET, "initial_rank": TARGET, "slots": SLOTS, **changes})


def budget_of(model: DynamicLoraModel) -> Budget:
    layers = model.adapted_layers()
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    return Budget(FixedRanks(dict.fromkeys(layers, TARGET)), component_costs(shapes, PARAMETERS))


def losses(model: nn.Module, rows: list[Tensor]):
    one = torch.ones(())
    return lambda number: model(input_ids=rows[number], labels=rows[number], num_items_in_batch=one).loss


def choice_of(model: DynamicLoraModel, ranks: str, count: int, most: int = 30_000) -> RankChoice:
    sizes = {name: layer.weight.shape.numel() for name, layer in model.adapted_layers().items()}
    groups = groups_within(sizes, most)
    return RankChoice(ranks=ranks, rows=range(count), seed=1, target_rank=TARGET, groups=groups)


def gradients(base: nn.Module, names: list[str], rows: list[Tensor]) -> dict[str, Tensor]:
    loss = losses(base, rows)
    sum(loss(number) for number in range(len(rows))).backward()
    return {name: base.get_submodule(name).weight.grad for name in names}


def chosen(model: DynamicLoraModel, ranks: str, rows: list[Tensor] = ROWS) -> dict[str, int]:
    return choose_ranks(model, losses(model, rows), choice_of(model, ranks, len(rows)), budget_of(model), Agreement())


def test_the_spectra_are_those_of_the_dense_gradients():
    model = student(tiny_model().double(), dtype="float64")
    layers = model.adapted_layers()
    with as_in_training(model):
        rows = Rows(model, losses(model, FEW), choice_of(model, GRADIENT_SPECTRUM, 1))
        found = spectra_of_gradients(layers, rows, Agreement())
    for name, gradient in gradients(tiny_model().double(), list(layers), FEW).items():
        torch.testing.assert_close(found[name], torch.linalg.svdvals(gradient)[:SLOTS], atol=0, rtol=1e-8)


@pytest.mark.parametrize("most", [1, 30_000, 10**9], ids=["a layer at a time", "some layers", "all at once"])
def test_the_importance_of_weights_is_that_of_the_dense_gradients(most):
    model = student(tiny_model().double(), dtype="float64")
    layers = model.adapted_layers()
    choice = choice_of(model, WEIGHT_GRADIENT, len(ROWS), most)
    assert choice.num_passes == {1: 14, 30_000: 3, 10**9: 1}[most]
    with as_in_training(model):
        found = weight_gradients(layers, choice.groups, Rows(model, losses(model, ROWS), choice), Agreement())
    for name, gradient in gradients(tiny_model().double(), list(layers), ROWS).items():
        weight = layers[name].weight.detach()
        assert found[name] == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-10)


def test_of_a_quantized_base_the_weights_that_it_computes_with_count(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, plain = student(load_base(tmp_path)), tiny_model()
    layers = model.adapted_layers()
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight.copy_(dequantized_weight(layer.base_layer))
    choice = choice_of(model, WEIGHT_GRADIENT, len(ROWS))
    with as_in_training(model):
        found = weight_gradients(layers, choice.groups, Rows(model, losses(model, ROWS), choice), Agreement())
    for name, gradient in gradients(plain, list(layers), ROWS).items():
        weight = plain.get_submodule(name).weight.detach()
        assert found[name] == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-3)


def test_planted_ranks_of_linear_teachers_are_found():
    """Every layer is a student of its own: the teacher is its weight and an update of a planted spectrum. With inputs
    that are the unit vectors, the gradient is minus that update."""
    model = student(tiny_model().double(), fuse=False, dtype="float64")
    layers, generator = model.adapted_layers(), torch.Generator().manual_seed(3)
    budget = budget_of(model)
    planted, targets = {}, {}
    for number, (name, layer) in enumerate(layers.items()):
        planted[name] = (4, 0, 2, 1, 3, 0, 4)[number % 7]
        out, width = layer.weight.shape
        left, right = (torch.linalg.qr(torch.randn(n, 6, generator=generator).double()).Q for n in (out, width))
        # In units of what a component costs, those that are planted are worth 10 to 13, and all others 0.01.
        values = torch.tensor([10.0 + place if place < planted[name] else 0.01 for place in range(6)]).double()
        values = (values * budget.costs[name]).sqrt()
        targets[name] = (layer.weight + (left * values) @ right.T).detach()
    cost = sum(budget.costs[name] * rank for name, rank in planted.items())
    budget = Budget(FixedRanks(planted), budget.costs)
    assert budget.final == cost

    def loss(_: int) -> Tensor:
        parts = []
        for name, layer in layers.items():
            inputs = torch.eye(layer.in_features, dtype=torch.float64)
            parts.append((layer(inputs) - inputs @ targets[name].T).square().sum() / 2)
        return sum(parts)

    assert choose_ranks(model, loss, choice_of(model, GRADIENT_SPECTRUM, 1), budget, Agreement()) == planted


@BOTH
@pytest.mark.parametrize("fuse", [True, False])
def test_ranks_meet_the_budget_within_the_slots_and_change_nothing(ranks, fuse, capsys):
    base = tiny_model()
    model = student(copy.deepcopy(base), fuse).eval()
    budget, random_state, trained = budget_of(model), torch.get_rng_state(), list(trainable(model))
    found = chosen(model, ranks)
    assert budget.is_met_by(found)
    least = 0 if ranks == GRADIENT_SPECTRUM else TARGET // 2
    assert all(least <= rank <= SLOTS for rank in found.values())
    assert len(set(found.values())) > 1
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (list(trainable(model)), model.training) == (trained, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.adapted_layers().values())
    span = f"{min(found.values())} to {max(found.values())} components a layer"
    assert f"ranks from 6 training rows (adapter.ranks is {ranks}): {span}" in capsys.readouterr().err
    controller = DynamicRankController(model.adapted_layers(), budget, Agreement())
    controller.fix_ranks(found)
    event = controller.before_first_step()
    assert event.ranks == controller.ranks == controller.plan == found
    assert torch.equal(logits(model), logits(base.eval()))
    controller.finish()


@BOTH
def test_the_ranks_do_not_depend_on_how_layers_are_computed(ranks):
    recomputing = student()
    recompute_first(recomputing.get_base_model(), 1)
    assert chosen(student(), ranks) == chosen(student(fuse=False), ranks) == chosen(recomputing, ranks)


def test_ranks_that_miss_the_budget_end_in_an_error():
    model = student()
    controller = DynamicRankController(model.adapted_layers(), budget_of(model), Agreement())
    controller.fix_ranks(dict.fromkeys(controller.layers, TARGET + 1))
    with pytest.raises(BudgetMissedError, match="are left instead of the budget"):
        controller.finish()


@BOTH
def test_a_layer_that_no_row_reaches_is_named(ranks):
    model = student()
    add_unreached_layer(model)
    with pytest.raises(ValueError, match=r"adapter\.ranks is \w+, but none of 6 .*unused .*set adapter\.ranks to unif"):
        chosen(model, ranks)


@BOTH
def test_ranks_from_data_are_none_of_an_adapter_alone(ranks):
    with pytest.raises(ValueError, match=f"config.ranks is {ranks}, which is made from training rows in a run"):
        adapt(tiny_model(), ranks=ranks)
