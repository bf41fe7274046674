from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from support.base_layers import ALPHA, IN, RANK, adapt_layer, make_base
from torch import Tensor, nn

from dora_dist.adapter.layer import ADALORA_STD, DynamicLoraLinear
from dora_dist.base_model.quantization import dequantized_weight
from dora_dist.config.adapter import DRAWN_INITS


def make_layer(kind: str = "plain", **options) -> DynamicLoraLinear:
    return adapt_layer(make_base(kind), **options)


def inputs(seed: int = 1, rows: int = 5) -> Tensor:
    return torch.randn(2, rows, IN, generator=torch.Generator().manual_seed(seed))


def adapter_parameters(layer: DynamicLoraLinear) -> dict[str, nn.Parameter]:
    return {"a": layer.lora_a, "gate": layer.gate, "b": layer.lora_b}


KINDS = pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])


@KINDS
@pytest.mark.parametrize("init", DRAWN_INITS)
def test_every_drawn_start_is_exactly_the_base(kind, init):
    layer = make_layer(kind, init=init)
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(inputs()), layer.base_layer(inputs()))


@pytest.mark.parametrize(
    ("init", "bound_a", "bound_b", "gate"),
    # Kaiming-uniform bounds: sqrt(6 / fan_in) for a=0, sqrt(1 / fan_in) for LoRA's a=sqrt(5); fan_in of B is the rank.
    [("lora", (1 / IN) ** 0.5, 0.0, 1.0), ("paper", (6 / IN) ** 0.5, (6 / RANK) ** 0.5, 0.0)],
)
def test_the_initial_values_are_drawn_as_specified(init, bound_a, bound_b, gate):
    layer = make_layer(init=init)
    for parameter, bound in ((layer.lora_a, bound_a), (layer.lora_b, bound_b)):
        assert 0.9 * bound <= parameter.abs().max() <= bound
    assert torch.equal(layer.gate, torch.full((RANK,), gate))
    assert layer.scale == ALPHA / RANK


def test_adalora_draws_what_peft_does():
    layer = make_layer(init="adalora")
    peer = get_peft_model(
        nn.Sequential(nn.Linear(4096, 4096)), AdaLoraConfig(init_r=4, total_step=1, target_modules="0")
    )
    lora_a, lora_b, values = (peer.base_model.model[0].get_parameter(f"lora_{part}.default") for part in "ABE")
    for drawn, stock in ((layer.lora_a, lora_a), (layer.lora_b, lora_b)):
        assert stock.std().item() == pytest.approx(ADALORA_STD, rel=0.02)
        assert drawn.std().item() == pytest.approx(ADALORA_STD, rel=0.25)
    assert not values.any()
    assert not layer.gate.any()


@KINDS
def test_the_forward_is_the_gated_sum_of_equation_6(kind):
    layer = make_layer(kind)
    x = inputs()
    update = sum(layer.gate[i] * torch.outer(layer.lora_b[:, i], layer.lora_a[i]) for i in range(RANK))
    weight = dequantized_weight(layer.base_layer) + ALPHA / RANK * update
    # int8: bitsandbytes may quantize the activations too (1 part in 127 of each row's maximum), depending on version.
    tolerance = 0.03 if kind == "int8" else 1e-5
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias, rtol=tolerance, atol=tolerance)


@KINDS
def test_gradients_are_finite_and_reach_every_adapter_parameter_and_the_input(kind):
    layer = make_layer(kind)
    x = inputs().requires_grad_()
    layer(x).square().sum().backward()
    for gradient in (x.grad, *(parameter.grad for parameter in adapter_parameters(layer).values())):
        assert torch.isfinite(gradient).all()
        assert (gradient != 0).flatten(1).any(1).all() if gradient.ndim > 1 else (gradient != 0).all()
    assert not any(parameter.grad is not None for parameter in layer.base_layer.parameters())


def test_a_component_pruned_softly_has_no_effect_but_a_gradient_to_grow_back():
    layer = make_layer()
    with torch.no_grad():
        layer.gate[2] = 0
    layer(inputs()).square().sum().backward()
    assert layer.gate.grad[2] != 0
    assert not layer.lora_a.grad[2].any()
    assert not layer.lora_b.grad[:, 2].any()


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("magnitude", [1.0, 1e30])
def test_a_masked_component_has_exactly_no_effect_and_no_gradient_however_large(kind, magnitude):
    masked, removed = make_layer(kind), make_layer(kind)
    with torch.no_grad():
        masked.component_mask[[1, 4]] = False
        removed.gate[[1, 4]] = 0
        for index in (1, 4):
            masked.lora_a[index] *= magnitude
            masked.lora_b[:, index] *= magnitude
            masked.gate[index] = magnitude
    outputs = [layer(inputs()) for layer in (masked, removed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for index in (1, 4):
        assert masked.gate.grad[index] == 0
        assert not masked.lora_a.grad[index].any()
        assert not masked.lora_b.grad[:, index].any()
    kept = [0, 2, 3, 5]
    assert torch.equal(masked.gate.grad[kept], removed.gate.grad[kept])
    assert torch.equal(masked.lora_b.grad[:, kept], removed.lora_b.grad[:, kept])


def test_dropout_acts_on_the_components_in_training_only():
    layer, without = make_layer(dropout=0.5), make_layer()
    x = inputs()
    torch.manual_seed(0)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    # On average over many rows dropout changes nothing: its scale is right.
    many = x[:1, :1].expand(1, 20_000, IN)
    torch.testing.assert_close(layer(many).mean(1), without(many).mean(1), rtol=0.02, atol=0.05)
    layer.eval()
    assert torch.equal(layer(x), without(x))
    fresh = make_layer(dropout=0.5, init="lora").train()
    assert torch.equal(fresh(x), fresh.base_layer(x)), "dropout must not touch the base"


def start_values(seed: int = 3, name: str = "layer", init: str = "paper") -> Tensor:
    layer = make_layer(init="lora")
    layer.initialize(init, seed, name, torch.float32)
    return torch.cat([layer.lora_a.flatten(), layer.lora_b.flatten(), layer.gate]).detach()


@pytest.mark.parametrize("init", DRAWN_INITS)
def test_the_start_depends_on_seed_and_name_only(init):
    first = start_values(init=init)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(start_values(init=init), first)
    assert not torch.equal(start_values(seed=4, init=init), first)
    assert not torch.equal(start_values(name="other", init=init), first)
    layer = make_layer(init="lora")
    torch.set_rng_state(state)
    layer.initialize(init, 3, "layer", torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "the global random state must not move"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapter_and_base_may_differ_in_dtype(dtype):
    layer, reference = make_layer(), make_layer()
    for parameter in adapter_parameters(layer).values():
        parameter.data = parameter.data.to(dtype)
    output = layer(inputs())
    assert output.dtype == torch.float32
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output, reference(inputs()), rtol=tolerance, atol=tolerance)


def test_an_unknown_init_is_refused():
    with pytest.raises(ValueError, match=r"init is 'pissa'.*lora, paper"):
        make_layer(init="pissa")


@pytest.mark.parametrize("init", ["inputs", "gradient"])
def test_a_start_from_data_is_none_of_a_layer_alone(init):
    drawn = ", ".join(DRAWN_INITS)
    with pytest.raises(ValueError, match=rf"init is '{init}', but must be one of {drawn}: .* made in a run"):
        make_layer(init=init)


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="got 'other'"):
        DynamicLoraLinear(make_base(), "other", config=SimpleNamespace(lora_dropout=0.0), r=2, lora_alpha=2)


def test_the_layer_follows_its_mask_however_it_changes():
    layer = make_layer()
    changes = [
        lambda: layer.component_mask.__setitem__([1, 4], False),
        lambda: layer.component_mask.copy_(torch.arange(RANK) < 2),
        lambda: layer.load_state_dict({"component_mask": torch.ones(RANK, dtype=torch.bool)}, strict=False),
        lambda: setattr(layer, "component_mask", torch.arange(RANK) == 3),
    ]
    x = inputs()
    for change in changes:
        change()
        update = layer.scale * (layer.lora_b * layer.effective_gate()) @ layer.lora_a
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ update.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_layer_that_kept_nothing_is_its_base_and_has_gradients_of_zero(kind):
    layer = make_layer(kind)
    layer.component_mask.fill_(False)
    x = inputs().requires_grad_()
    output = layer(x)
    assert torch.equal(output, layer.base_layer(x))
    output.sum().backward()
    assert x.grad.any()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in adapter_parameters(layer).values()
    )
