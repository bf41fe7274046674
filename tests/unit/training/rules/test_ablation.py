"""Ablation by gradients against ablation itself, on layers of a quadratic loss and on a small model."""

import pytest
import torch
from support.rank_functions import make_layers
from support.tiny_models import adapt, shake, tiny_model, tokens
from torch import nn

from dora_dist.distributed.agreement import Agreement
from dora_dist.training.rules.ablation import ablation_gradient_scores, ablation_scores

ROWS = [tokens(1, 10 + number, seed=number) for number in range(3)]


def quadratic():
    """Three layers side by side, whose summed outputs are to hit a target: model, layers, losses of four rows."""
    layers = list(make_layers().values())
    model = nn.ModuleList(layers).double()
    generator = torch.Generator().manual_seed(3)
    xs, ys = torch.randn(4, 8, generator=generator).double(), torch.randn(4, 12, generator=generator).double()
    with torch.no_grad():
        layers[1].component_mask[2] = False
    losses = [
        lambda x=x, y=y: (sum(layer(x) for layer in layers) - y).square().sum() for x, y in zip(xs, ys, strict=True)
    ]
    return model, layers, losses


def small_model(size: float = 1.0, **options):
    """A Llama in float64 whose components have been multiplied by ``size``."""
    model = shake(adapt(tiny_model().double(), dtype="float64", **options))
    layers = list(model.adapted_layers().values())
    for layer in layers:
        layer.gate.data.mul_(size)
    return model, layers, [lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in ROWS]


def total(losses) -> float:
    with torch.no_grad():
        return float(sum(loss() for loss in losses))


def corner(layers, losses, kept) -> float:
    """The loss with these components alone, set by their gates; independent of the masks' own code."""
    before = [layer.gate.detach().clone() for layer in layers]
    for number, layer in enumerate(layers):
        for index in range(len(layer.gate)):
            if (number, index) not in kept:
                layer.gate.data[index] = 0
    found = total(losses)
    for layer, values in zip(layers, before, strict=True):
        layer.gate.data.copy_(values)
    return found


# transformers makes the loss of a language model in float32.
@pytest.mark.parametrize(("case", "tolerance"), [(quadratic, 1e-10), (small_model, 1e-5)])
def test_exact_scores_are_the_papers_equation(case, tolerance):
    model, layers, losses = case()
    found = ablation_scores(model, layers, losses, Agreement())
    alive = {(n, i) for n, layer in enumerate(layers) for i in range(len(layer.gate)) if layer.component_mask[i]}
    assert found.dtype == torch.float64
    starts = torch.tensor([0, *(len(layer.gate) for layer in layers)]).cumsum(0).tolist()
    for n, layer in enumerate(layers):
        for i in range(len(layer.gate)):
            wanted = corner(layers, losses, alive - {(n, i)}) - corner(layers, losses, {(n, i)})
            score = float(found[starts[n] + i])
            assert score == pytest.approx(wanted, abs=tolerance) if (n, i) in alive else score == 0


def test_of_a_quadratic_loss_two_gradients_are_the_exact_scores_up_to_the_constant():
    model, layers, losses = quadratic()
    exact = ablation_scores(model, layers, losses, Agreement())
    cheap = ablation_gradient_scores(model, layers, losses, Agreement())
    alive = torch.cat([layer.component_mask for layer in layers])
    constant = corner(layers, losses, set()) - total(losses)
    torch.testing.assert_close(cheap[alive], exact[alive] + constant, rtol=1e-10, atol=1e-10)
    assert cheap[~alive].eq(0).all()
    # Completeness: the halves sum up to what the adapter has won.
    assert float(cheap.sum()) / 2 == pytest.approx(constant, rel=1e-10)


def test_of_a_model_the_difference_is_of_third_order():
    errors, gaps = [], []
    for size in (0.02, 0.01):
        model, layers, losses = small_model(size)
        exact = ablation_scores(model, layers, losses, Agreement())
        cheap = ablation_gradient_scores(model, layers, losses, Agreement())
        constant = corner(layers, losses, set()) - total(losses)
        errors.append(float((cheap - exact - constant).abs().max()))
        gaps.append(abs(float(cheap.sum()) / 2 - constant))
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 6.5 < gaps[0] / gaps[1] < 9.5


def test_scores_are_twice_a_trapezoid_of_the_integrated_gradient():
    model, layers, losses = small_model()
    gates = [layer.gate for layer in layers]
    values = torch.cat([gate.detach().clone() for gate in gates])
    sizes = [len(gate) for gate in gates]

    def gradient(share: float) -> torch.Tensor:
        for gate, part in zip(gates, values.split(sizes), strict=True):
            gate.data.copy_(part * share)
        found = torch.autograd.grad(sum(loss() for loss in losses), gates)
        return torch.cat(found)

    ends = [gradient(1.0), gradient(0.0)]
    fine = [gradient(number / 64) for number in range(65)]
    integral = -values * (sum(fine) - (fine[0] + fine[-1]) / 2) / 64
    gradient(1.0)
    cheap = ablation_gradient_scores(model, layers, losses, Agreement())
    torch.testing.assert_close(cheap, -values * (ends[0] + ends[1]), rtol=1e-10, atol=1e-12)
    # The integral itself is complete.
    won = corner(layers, losses, set()) - total(losses)
    assert float(integral.sum()) == pytest.approx(won, rel=1e-2)


@pytest.mark.parametrize("score", [ablation_scores, ablation_gradient_scores])
@pytest.mark.parametrize("options", [{}, {"train_gates": False}, {"dropout": 0.5}])
def test_scoring_leaves_the_model_as_it_was(score, options):
    model, layers, losses = small_model(**options)
    model.train()
    layers[0].component_mask[1] = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = score(model, layers, losses, Agreement())
    assert found.shape == (sum(len(layer.gate) for layer in layers),)
    assert found[1] == 0
    assert torch.equal(found, score(model, layers, losses, Agreement()))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("score", [ablation_scores, ablation_gradient_scores])
def test_a_loss_that_is_not_finite_is_refused_and_the_model_restored(score):
    model, layers, losses = quadratic()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"scoring rows.* choose another pruning\.importance"):
        score(model, layers, [lambda: losses[0]() * float("nan")], Agreement())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_time_of_the_exact_scores_is_said_first(capsys):
    model, layers, losses = quadratic()
    ablation_scores(model, layers, losses, Agreement())
    assert "scoring 17 components by ablation, 34 forwards of 4 rows: about" in capsys.readouterr().err
