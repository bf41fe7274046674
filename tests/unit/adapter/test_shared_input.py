"""Layers that are computed together because one module calls them with the same tensor."""

import copy

import pytest
import torch
from support.base_layers import IN, adapt_layer, drop_the_same, make_base
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.shared_input import share_inputs


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (adapt_layer(make_base(seed=seed), **options) for seed in range(3))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return self.q_proj(x) * self.k_proj(other) + self.v_proj(other)

    def layers(self) -> list[DynamicLoraLinear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def is_shared(self) -> bool:
        return all(layer.shared is not None for layer in self.layers())


def draw_x(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def results(attention: Attention, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    output = attention(*inputs)
    parameters = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), [*inputs, *parameters])]


def shared_and_not(*inputs: Tensor, **options) -> tuple[Attention, list[Tensor], list[Tensor]]:
    alone, shared = Attention(**options), Attention(**options)
    share_inputs(shared)
    assert shared.is_shared()
    drop_the_same(alone.layers())
    return shared, results(shared, *inputs), results(alone, *inputs)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To float32's rounding, measured by the largest entry: others may be differences of large ones."""
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_together_is_as_each_alone(dropout):
    shared, found, wanted = shared_and_not(draw_x(), dropout=dropout)
    assert_same(found, wanted)
    assert shared.is_shared()


def test_layers_that_do_not_drop_alike_are_refused():
    """One of them in another mode: it would have dropped what the first one drops."""
    attention = Attention(dropout=0.4)
    share_inputs(attention)
    attention.v_proj.eval()
    with pytest.raises(ValueError, match=r"dropout 0\.0, 0\.4, but they drop the same entries"):
        attention(draw_x())


def test_each_step_computes_once_and_keeps_nothing():
    calls = []
    attention = Attention()
    share_inputs(attention)
    for layer in attention.layers():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        attention(draw_x())
    assert len(calls) == 9
    assert attention.is_shared()
    assert attention.q_proj.shared._input is None
    assert not attention.q_proj.shared._outputs


def test_a_layer_called_by_itself_sees_its_parameters_as_they_are():
    attention, alone = Attention(), Attention()
    share_inputs(attention)
    x = draw_x()
    attention.q_proj(x)
    for one in (attention, alone):
        one.k_proj.component_mask[:2] = False
        one.v_proj.lora_b.data.mul_(2)
    for name in ("k_proj", "v_proj"):
        torch.testing.assert_close(getattr(attention, name)(x), getattr(alone, name)(x))


def test_the_same_tensor_with_other_values_is_computed_anew():
    class Doubling(Attention):
        def forward(self, x: Tensor) -> Tensor:
            first = self.q_proj(x)
            return first + self.k_proj(x.mul_(2))

    attention, alone = Doubling(), Doubling()
    share_inputs(attention)
    torch.testing.assert_close(attention(draw_x().detach()), alone(draw_x().detach()))


def test_cross_attention_is_right_and_is_no_longer_computed_ahead():
    shared, found, wanted = shared_and_not(draw_x(), draw_x(2))
    assert_same(found, wanted)
    assert not any(layer.shared is not None for layer in shared.layers())


def test_that_nothing_is_computed_ahead_any_more_is_said_once(capfd):
    class SaysSo(Attention):
        pass

    layers = nn.ModuleList([SaysSo(), SaysSo()])
    share_inputs(layers)
    for layer in layers:
        layer(draw_x())
    assert capfd.readouterr().err == ""
    for layer in layers:
        layer(draw_x(), draw_x(2))
        layer(draw_x(), draw_x(2))
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("a SaysSo has called its q_proj, k_proj, v_proj with different tensors")


def test_an_exception_in_the_middle_leaves_nothing_behind():
    attention, x = Attention(), draw_x()
    share_inputs(attention)

    def fail(*_) -> None:
        raise MemoryError

    handle = attention.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        attention(x)
    handle.remove()
    assert not attention.q_proj.shared._outputs
    torch.testing.assert_close(attention(x), Attention()(x), rtol=1e-4, atol=1e-4)
    assert attention.is_shared()


def test_a_copy_shares_within_itself():
    attention = Attention()
    share_inputs(attention)
    attention.q_proj(draw_x())
    copied = copy.deepcopy(attention)
    assert copied.q_proj.shared is copied.k_proj.shared
    assert copied.q_proj.shared is not attention.q_proj.shared
    with torch.no_grad():
        copied.k_proj.lora_b.zero_()
    x = draw_x()
    assert not torch.equal(copied(x), attention(x))


def test_layers_that_are_off_are_their_bases():
    attention, x = Attention(), draw_x()
    share_inputs(attention)
    for layer in attention.layers():
        layer.enable_adapters(False)
    q, k, v = (layer.base_layer(x) for layer in attention.layers())
    assert torch.equal(attention(x), q * k + v)


def test_bare_layers_and_layers_of_other_widths_are_left_alone():
    attention = Attention()
    attention.k_proj = attention.v_proj = make_base()
    share_inputs(attention)
    assert attention.q_proj.shared is None
    attention = Attention()
    attention.v_proj = adapt_layer(make_base(width=2 * IN))
    share_inputs(attention)
    assert attention.q_proj.shared is None
    attention = Attention()
    attention.v_proj = adapt_layer(make_base("nf4"))
    share_inputs(attention)
    assert attention.q_proj.shared is None
