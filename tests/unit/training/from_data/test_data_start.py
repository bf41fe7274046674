"""Starts from data against the dense decomposition of what they are made of, on a model small enough for it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES, adapt, add_unreached_layer, load_base, tiny_model, tokens, trainable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.quantization import dequantized_weight
from dora_dist.base_model.recomputation import recompute_first
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.subspaces import EXTRA_PROBES, fixed_signs
from dora_dist.training.from_data.start import GAMMA, LENGTH, DataStart, start_from_data

INITS = pytest.mark.parametrize("init", ["inputs", "gradient"])
ROWS = [tokens(1, 8 + number, seed=number) for number in range(6)]
RANK = 3


def losses(model: nn.Module, rows: list[Tensor]) -> Callable[[int], Tensor]:
    one = torch.ones(())
    return lambda number: model(input_ids=rows[number], labels=rows[number], num_items_in_batch=one).loss


def start(model: DynamicLoraModel, init: str, rows: list[Tensor] = ROWS, seed: int = 1) -> dict[str, Tensor]:
    """The rows a_i of every layer."""
    settings = DataStart(init=init, rows=range(len(rows)), seed=seed)
    start_from_data(model, losses(model, rows), settings, Agreement())
    return {name: layer.lora_a.detach() for name, layer in model.adapted_layers().items()}


def dense(base: nn.Module, names: list[str], init: str, rows: list[Tensor] = ROWS) -> dict[str, Tensor]:
    """What directions are of: all inputs of a layer, shape (tokens, in), or the gradient of its weight, (out, in)."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        look = base.get_submodule(name).register_forward_pre_hook
        look(lambda _, args, name=name: inputs[name].append(args[0][0].detach()))
    loss = losses(base, rows)
    sum(loss(number) for number in range(len(rows))).backward()
    if init == "inputs":
        return {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: base.get_submodule(name).weight.grad for name in names}


@INITS
def test_with_as_many_probes_as_directions_the_start_is_the_dense_decomposition(init):
    # So few tokens have no more directions than there are probes: one pass finds all.
    rows = [tokens(1, RANK + EXTRA_PROBES, seed=7)]
    found = start(adapt(tiny_model().double(), dtype="float64"), init, rows)
    for name, matrix in dense(tiny_model().double(), list(found), init, rows).items():
        wanted = torch.linalg.svd(matrix).Vh[:RANK]
        torch.testing.assert_close(found[name], wanted * fixed_signs(wanted) * LENGTH, atol=1e-8, rtol=0)


def test_lora_one_is_the_leading_part_of_the_step_down_the_gradient():
    """``b a = -U S V' / (S_1 gamma)``, and both factors are as long."""
    rows = [tokens(1, RANK + EXTRA_PROBES, seed=7)]
    model = adapt(tiny_model().double(), dtype="float64")
    found = start(model, "lora_one", rows)
    for name, matrix in dense(tiny_model().double(), list(found), "lora_one", rows).items():
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        step = -(left[:, :RANK] * values[:RANK]) @ right[:RANK] / (values[0] * GAMMA)
        layer = model.adapted_layers()[name]
        torch.testing.assert_close(layer.lora_b.detach() @ found[name], step, atol=1e-8, rtol=0)
        lengths = (values[:RANK] / values[0] / GAMMA).sqrt()
        torch.testing.assert_close(found[name].norm(dim=1), lengths, atol=1e-8, rtol=0)
        torch.testing.assert_close(layer.lora_b.detach().norm(dim=0), lengths, atol=1e-8, rtol=0)


def test_the_loss_is_lower_from_lora_one_than_from_the_base(capsys):
    model = adapt(tiny_model())
    loss = losses(model, ROWS)
    before = sum(loss(number).item() for number in range(len(ROWS)))
    start(model, "lora_one")
    after = sum(loss(number).item() for number in range(len(ROWS)))
    assert after < before - 0.01
    assert "one step down their gradient instead of at the base (adapter.init lora_one)" in capsys.readouterr().err


@INITS
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_over_many_tokens_the_start_holds_nearly_as_much_as_the_best_directions(init, quantization, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = adapt(load_base(tmp_path, quantization))
    plain = tiny_model()
    with torch.no_grad():
        for name, layer in model.adapted_layers().items():
            plain.get_submodule(name).weight.copy_(dequantized_weight(layer.base_layer))
    found = start(model, init)
    for name, matrix in dense(plain, list(found), init).items():
        best = torch.linalg.svdvals(matrix)[:RANK].square().sum()
        held = (matrix @ found[name].T / LENGTH).square().sum()
        assert 0.95 * best < held < 1.0001 * best, name


@INITS
@pytest.mark.parametrize("fuse", [True, False])
def test_the_model_is_the_base_bit_for_bit_and_nothing_else_has_changed(init, fuse):
    base = tiny_model()
    model = adapt(copy.deepcopy(base), fuse).eval()
    random_state, trained = torch.get_rng_state(), list(trainable(model))
    for rows in start(model, init).values():
        torch.testing.assert_close(rows @ rows.T, torch.eye(RANK) / 3, atol=1e-6, rtol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (list(trainable(model)), model.training) == (trained, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.adapted_layers().values())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ROWS[0]).logits, base(input_ids=ROWS[0]).logits)
    for layer in model.adapted_layers().values():
        assert torch.equal(layer.gate, torch.ones(RANK))
        assert not layer.lora_b.any()


@INITS
def test_the_start_does_not_depend_on_how_layers_are_computed(init):
    found = [start(adapt(tiny_model(), fuse), init) for fuse in (True, False)]
    recomputing = adapt(tiny_model())
    recompute_first(recomputing.get_base_model(), 1)
    found.append(start(recomputing, init))
    for name, rows in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], rows, atol=1e-5, rtol=0)


def test_layers_that_read_one_tensor_share_the_directions_of_their_inputs():
    found = start(adapt(tiny_model()), "inputs")
    for block in ("model.layers.0", "model.layers.1"):
        query, key, value = (found[f"{block}.self_attn.{kind}_proj"] for kind in "qkv")
        assert torch.equal(query, key)
        assert torch.equal(query, value)
        assert torch.equal(found[f"{block}.mlp.gate_proj"], found[f"{block}.mlp.up_proj"])
    gradient = start(adapt(tiny_model()), "gradient")
    assert not torch.allclose(gradient["model.layers.0.mlp.gate_proj"], gradient["model.layers.0.mlp.up_proj"])


class Largest(TorchDispatchMode):
    """Shapes of all tensors that operations make; views of weights are none of theirs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.shapes.add(tuple(tensor.shape))
        return result


@INITS
def test_no_matrix_of_the_size_of_a_layer_is_made(init):
    sides = {SIZES["hidden_size"], SIZES["intermediate_size"], 32}
    model = adapt(tiny_model())
    with Largest(model) as made:
        start(model, init)
    assert (SIZES["hidden_size"], RANK + EXTRA_PROBES) in made.shapes
    assert not {shape for shape in made.shapes if len(shape) > 1 and {*shape[-2:]} <= sides}


@INITS
def test_a_layer_that_no_row_reaches_is_named(init):
    model = adapt(tiny_model())
    add_unreached_layer(model)
    with pytest.raises(ValueError, match=r"none of 6 training rows has given .*unused .*adapter\.calibration_rows"):
        start(model, init)


@INITS
def test_what_is_not_finite_is_refused_with_the_layer(init):
    base = tiny_model()
    with torch.no_grad():
        base.model.norm.weight[3] = torch.nan if init == "gradient" else 1
        base.model.layers[1].input_layernorm.weight[3] = torch.inf if init == "inputs" else 1
    with pytest.raises(ValueError, match=r"adapter\.init is \w+, but model\.layers.*that is not finite"):
        start(adapt(base), init)
