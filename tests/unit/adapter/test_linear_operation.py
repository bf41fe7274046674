"""The fused operation against the same formula left to autograd."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.base_layers import IN, OUT, RANK, make_base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_dist.adapter.components import operands_of
from dora_dist.adapter.linear_operation import Frozen, adapted_linears

SCALE = 2 / 3
KEPT = {"all": list(range(RANK)), "some": [0, 3, 4], "one": [5], "none": []}


@dataclass(eq=False)
class Parameters:
    """Those of a layer."""

    lora_a: Tensor
    gate: Tensor
    lora_b: Tensor
    component_mask: Tensor
    scale: float = SCALE


def mask_of(kept: list[int]) -> Tensor:
    return torch.tensor([number in kept for number in range(RANK)])


ALL = mask_of(KEPT["all"])


def draw(dtype: torch.dtype = torch.float32, kind: str = "plain") -> tuple[nn.Module, list[Tensor]]:
    """A base, and x, A, gate and B with gradients."""
    base = make_base(kind).to(dtype) if kind == "plain" else make_base(kind)
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 9, IN), (RANK, IN), (RANK,), (OUT, RANK))
    return base, [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def adapted_linear(x: Tensor, lora_a: Tensor, gate: Tensor, lora_b: Tensor, base, mask=ALL, dropout=0.0) -> Tensor:
    operands = operands_of([Parameters(lora_a, gate, lora_b, mask)], None)
    return adapted_linears(x, operands, Frozen((base,), dropout))[0]


def by_autograd(x: Tensor, lora_a: Tensor, gate: Tensor, lora_b: Tensor, base, mask=ALL, dropout=0.0) -> Tensor:
    lora_a, gate, lora_b = lora_a[mask], gate[mask], lora_b[:, mask]
    rows = x
    if dropout:
        left = torch.native_dropout(torch.ones_like(x).flatten(0, 1), dropout, True)[0]
        rows = x * left.view_as(x)
    hidden = F.linear(rows.to(lora_a.dtype), lora_a) * (gate * SCALE)
    output = base(x)
    return output + F.linear(hidden, lora_b).to(output.dtype)


def results(function, base: nn.Module, inputs: list[Tensor], **options) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(5)
    output = function(*inputs, base, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kept", KEPT)
def test_output_and_gradients_are_those_of_the_formula(kept, dropout):
    base, inputs = draw(torch.float64)
    options = {"mask": mask_of(KEPT[kept]), "dropout": dropout}
    found, wanted = (results(function, base, inputs, **options) for function in (adapted_linear, by_autograd))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_the_base_may_be_quantized(kind, dropout):
    base, inputs = draw(kind=kind)
    found, wanted = (results(function, base, inputs, dropout=dropout) for function in (adapted_linear, by_autograd))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_a_base_in_bfloat16(kind, adapter, dropout):
    """Against the formula in bfloat16, whose own error the tolerance is made of."""
    base, inputs = draw(kind=kind)
    base.to(torch.bfloat16)
    if kind == "nf4":
        base.compute_dtype = torch.bfloat16
    inputs = [inputs[0].detach().bfloat16().requires_grad_()] + [
        tensor.detach().to(adapter).requires_grad_() for tensor in inputs[1:]
    ]
    found, wanted = (results(function, base, inputs, dropout=dropout) for function in (adapted_linear, by_autograd))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast_computes_the_components_in_its_dtype(dropout):
    base, inputs = draw()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (results(function, base, inputs, dropout=dropout) for function in (adapted_linear, by_autograd))
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    base, inputs = draw(torch.float64)
    wanted = results(by_autograd, base, inputs)[1:]
    inputs[frozen].requires_grad_(False)
    x, *adapter = inputs
    output = adapted_linear(x, *adapter, base)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    (output * weights).sum().backward()
    for index, tensor in enumerate(inputs):
        if index == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, wanted[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_drops_the_same_entries(dropout):
    base, inputs = draw(torch.float64)

    def checkpointed(*arguments, **options):
        return checkpoint(adapted_linear, *arguments, use_reentrant=False, **options)

    found, wanted = (results(function, base, inputs, dropout=dropout) for function in (checkpointed, adapted_linear))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_second_derivative_is_refused():
    base, inputs = draw(torch.float64)
    output = adapted_linear(*inputs, base)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inputs_are_left_as_they_are():
    base, inputs = draw()
    before = [tensor.detach().clone() for tensor in (*inputs, base.weight, base.bias)]
    results(adapted_linear, base, inputs)
    assert all(torch.equal(*pair) for pair in zip(before, (*inputs, base.weight, base.bias), strict=True))


def test_nothing_of_the_inputs_size_is_kept_but_the_input():
    base, inputs = draw()
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linear(*inputs, base, dropout=0.3)
    own = {tensor.data_ptr() for tensor in inputs}
    sizes = {(tensor.dtype, tensor.numel()) for tensor in kept if tensor.data_ptr() not in own}
    # a_i . x, the mask of dropout, a byte an entry, and what the components are made of
    small = {(torch.float32, numel) for numel in (RANK, IN * RANK, OUT * RANK)}
    assert sizes - small == {(torch.float32, 18 * RANK), (torch.bool, 18 * IN)}


def test_training_follows_the_formulas_trajectory():
    """Two layers, AdamW, components that are dropped on the way; in float64 the paths stay together."""
    losses = {}
    for function in (adapted_linear, by_autograd):
        base, (x, *adapter) = draw(torch.float64)
        second = nn.Linear(OUT, IN, bias=False, dtype=torch.float64)
        with torch.no_grad():
            second.weight.copy_(torch.randn(IN, OUT, generator=torch.Generator().manual_seed(3)) / 8)
        more = [adapter[2].detach().T.clone(), adapter[1].detach().clone(), adapter[0].detach().T.clone()]
        more = [tensor.contiguous().requires_grad_() for tensor in more]
        optimizer = torch.optim.AdamW([*adapter, *more], lr=1e-2)
        losses[function] = []
        for step in range(30):
            mask = ALL if step < 15 else mask_of([1, 2, 5])
            hidden = torch.tanh(function(x.detach(), *adapter, base, mask))
            loss = (function(hidden, *more, second, mask) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[function].append(loss.item())
    assert losses[adapted_linear] == pytest.approx(losses[by_autograd], rel=1e-10)
    assert losses[adapted_linear][-1] < losses[adapted_linear][0]


@pytest.mark.parametrize("kept", [KEPT["all"], [0, 3]])
def test_layers_that_read_one_tensor_are_as_each_alone(kept):
    """Of which one has lost components; the gradient of the input is the sum."""
    x, layers, bases, tensors = two_layers(kept)
    together = adapted_linears(x, operands_of(layers, None), Frozen(bases))
    each = [
        adapted_linears(x, operands_of([one], None), Frozen((base,)))[0]
        for one, base in zip(layers, bases, strict=True)
    ]
    found, wanted = (
        [*outputs, *torch.autograd.grad(sum((at + 2) * y.square().sum() for at, y in enumerate(outputs)), tensors)]
        for outputs in (together, each)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_layers_that_read_one_tensor_drop_the_same_entries():
    x, layers, bases, tensors = two_layers([0, 3])
    torch.manual_seed(5)
    together = adapted_linears(x, operands_of(layers, None), Frozen(bases, 0.4))
    each = []
    for one, base in zip(layers, bases, strict=True):
        torch.manual_seed(5)
        each.append(by_autograd(x, one.lora_a, one.gate, one.lora_b, base, one.component_mask, 0.4))
    found, wanted = (
        [*outputs, *torch.autograd.grad(sum((at + 2) * y.square().sum() for at, y in enumerate(outputs)), tensors)]
        for outputs in (together, each)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def two_layers(kept: list[int]):
    """Input, parameters of two layers, their bases, and all that has gradients; float64."""
    _, (x, *first) = draw(torch.float64)
    second = [(tensor.detach() * 2).requires_grad_() for tensor in first]
    layers = [Parameters(*first, mask_of(kept)), Parameters(*second, ALL)]
    bases = tuple(make_base(seed=seed).to(torch.float64) for seed in (0, 1))
    return x, layers, bases, [x, *first, *second]
