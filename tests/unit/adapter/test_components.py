"""Components of all layers made at once, against those of each layer alone."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from support.base_layers import adapt_layer, make_base
from support.tiny_models import adapt, shake, tiny_model, tokens, trainable
from torch import Tensor

from dora_dist.adapter.components import Layout, operands_of, stacks_of
from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.benchmark.operations import Operations
from dora_dist.method.regularizer import penalty_of_stacks


def make_model(fuse: bool = True, checkpointing: bool = False, dtype: str = "float64") -> DynamicLoraModel:
    model = shake(adapt(tiny_model().to(getattr(torch, dtype)), fuse, dtype=dtype)).train()
    model.adapted_layers()["model.layers.0.self_attn.q_proj"].component_mask[1] = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def weighted(model: DynamicLoraModel, seed: int = 2) -> Tensor:
    """A scalar that depends on every output."""
    logits = model(input_ids=tokens()).logits
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)).sum()


def gradients(model: DynamicLoraModel, run: Callable[[], None]) -> list[Tensor]:
    model.zero_grad()
    run()
    found = [parameter.grad for parameter in trainable(model).values()]
    assert all(gradient.any() for gradient in found)
    return found


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


def test_they_are_those_of_each_layer():
    bases = [make_base(out=out, width=width, seed=out) for out, width in ((32, 64), (48, 64), (32, 64), (64, 48))]
    layers = [adapt_layer(base, rank) for base, rank in zip(bases, (6, 6, 3, 2), strict=True)]
    layers[0].component_mask[[0, 4]] = False
    groups = [layers[:2], layers[2:3], layers[3:]]
    layout = Layout(groups)
    found = layout.operands(layout.stack())
    for group, operands in zip(groups, found, strict=True):
        assert torch.equal(operands.rows, torch.cat([layer.lora_a * kept(layer) for layer in group]))
        for layer, columns in zip(group, operands.columns, strict=True):
            wanted = (layer.scale * layer.lora_b * layer.effective_gate()).mT
            torch.testing.assert_close(columns, wanted, rtol=1e-6, atol=0)
            assert not columns[~layer.component_mask].any()


def kept(layer: DynamicLoraLinear) -> Tensor:
    return layer.component_mask.unsqueeze(1).float()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_are_made_once_a_step(checkpointing):
    """In the forward: neither by a layer, nor when a layer is computed again."""
    model = make_model(checkpointing=checkpointing)
    with Operations() as forward:
        loss = weighted(model)
    with Operations() as backward:
        loss.backward()
    kinds = {"in": {64, 128}, "out": {64, 32, 128}}
    layers = model.adapted_layers().values()
    assert {layer.in_features for layer in layers} == kinds["in"]
    assert {layer.out_features for layer in layers} == kinds["out"]
    assert forward.counts["aten::stack"] == len(kinds["out"])
    assert backward.counts["aten::stack"] == 0


def test_they_have_the_gradients_of_the_layers_alone():
    found, wanted = (
        gradients(model, lambda model=model: weighted(model).backward())
        for model in (make_model(), make_model(fuse=False))
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_may_go_before_two_backwards(checkpointing, first):
    model, plain = make_model(checkpointing=checkpointing), make_model()

    def interleaved() -> None:
        losses = [weighted(model, seed) for seed in (2, 3)]
        losses[first].backward()
        losses[1 - first].backward()

    def in_turn() -> None:
        for seed in (2, 3):
            weighted(plain, seed).backward()

    assert_close(gradients(model, interleaved), gradients(plain, in_turn))


def test_a_forward_without_gradients_in_between_changes_nothing():
    model, plain = make_model(checkpointing=True), make_model()

    def interrupted() -> None:
        loss = weighted(model)
        with torch.no_grad():
            weighted(model)
        loss.backward()

    assert_close(gradients(model, interrupted), gradients(plain, lambda: weighted(plain).backward()))


def test_a_term_of_the_parameters_may_share_the_forwards_copies():
    """The regularizer: its gradient is that of the parameters on their own."""
    model, plain = make_model(), make_model(fuse=False)
    layers = [list(one.adapted_layers().values()) for one in (model, plain)]
    assert plain.adapted_layers()["model.layers.0.mlp.up_proj"].gathered is None

    def joined(one: DynamicLoraModel, own: list[DynamicLoraLinear]) -> Callable[[], None]:
        def run() -> None:
            loss = weighted(one)
            stacks = stacks_of(own, own[0].gathered)
            (loss + 1e3 * penalty_of_stacks(stacks.rows, stacks.columns)).backward()

        return run

    assert_close(gradients(model, joined(model, layers[0])), gradients(plain, joined(plain, layers[1])))


def test_parameters_and_masks_are_read_as_they_are_at_each_forward():
    model, plain = make_model(), make_model(fuse=False)
    outputs = []
    for one in (model, plain):
        weighted(one).backward()
        weighted(one)  # has no backward
        layer = one.adapted_layers()["model.layers.1.mlp.down_proj"]
        with torch.no_grad():
            layer.lora_b.mul_(2)
        layer.component_mask[2:] = False
        gathered = stacks_of([layer], None)
        assert torch.equal(gathered.columns[0][0], layer.lora_b)
        outputs.append(weighted(one))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_without_its_head_has_the_gradients_of_the_layers_alone(checkpointing):
    def run(model: DynamicLoraModel) -> list[Tensor]:
        def forward_and_backward() -> None:
            hidden = model.get_base_model().model(input_ids=tokens()).last_hidden_state
            (
                hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=hidden.dtype)
            ).sum().backward()

        return gradients(model, forward_and_backward)

    assert_close(run(make_model(checkpointing=checkpointing)), run(make_model(fuse=False)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inference_mode_comes_before_training_and_in_between(checkpointing):
    model, reference = make_model(checkpointing=checkpointing), make_model(fuse=False)

    def run() -> None:
        with torch.inference_mode():
            torch.testing.assert_close(weighted(model), weighted(reference))
        loss = weighted(model)
        with torch.inference_mode():
            weighted(model)
        loss.backward()

    assert_close(gradients(model, run), gradients(reference, lambda: weighted(reference).backward()))


@pytest.mark.full("models")
def test_a_compiled_model_reads_masks_as_they_are():
    def run(model: DynamicLoraModel) -> list[Tensor]:
        compiled = torch.compile(model, backend="eager")

        def two_steps() -> None:
            weighted(compiled).backward()
            model.adapted_layers()["model.layers.1.mlp.up_proj"].component_mask[0] = False
            weighted(compiled).backward()

        return gradients(model, two_steps)

    assert_close(run(make_model()), run(make_model(fuse=False)))


def test_reentrant_checkpointing_is_refused():
    """Half of the layers would have had no gradient."""
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    loss = weighted(model)
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        loss.backward()


def test_a_layer_called_by_itself_reads_its_own():
    model = make_model()
    layer = model.adapted_layers()["model.layers.0.mlp.up_proj"]
    weighted(model)
    with torch.no_grad():
        layer.gate.mul_(3)
    assert layer.gathered.of([layer]) is None
    (columns,) = operands_of([layer], layer.gathered).columns
    torch.testing.assert_close(columns, (layer.scale * layer.lora_b * layer.gate).mT)


def test_nothing_is_kept_after_the_backward_or_without_gradients():
    model = make_model(checkpointing=True)
    gathered = next(iter(model.adapted_layers().values())).gathered
    weighted(model).backward()
    assert gathered._stacks is None
    assert gathered._operands is None
    with torch.no_grad():
        weighted(model)
    assert gathered._operands is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_no_forward_leaves_anything_behind(backward, checkpointing):
    model = make_model(checkpointing=checkpointing)
    layers = list(model.adapted_layers().values())
    made = []
    for _ in range(3):
        loss = weighted(model)
        stacks = stacks_of(layers, layers[0].gathered)
        made += [weakref.ref(stack) for stack in (*stacks.rows, *stacks.columns)]
        loss = loss + penalty_of_stacks(stacks.rows, stacks.columns)
        if backward:
            loss.backward()
        del loss, stacks
    assert not backward or not any(stack() is not None for stack in made)
    del model, layers
    gc.collect()
    assert not any(stack() is not None for stack in made)


def test_a_model_can_be_copied_between_forward_and_backward():
    model = make_model()
    loss = weighted(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(weighted(copied), loss)
    layers = copied.adapted_layers()
    assert all(layer.gathered is layers["model.layers.0.mlp.up_proj"].gathered for layer in layers.values())
    assert layers["model.layers.0.mlp.up_proj"].gathered._place.keys() == set(layers.values())


def test_a_layer_that_no_token_reaches_has_gradients_of_zero():
    """As an expert may: the same under every engine, and whatever else the loss depends on."""
    layers = [adapt_layer(make_base(seed=seed)) for seed in (0, 1)]
    layout = Layout([[layer] for layer in layers])
    operands = layout.operands(layout.stack())
    operands[0].columns[0].sum().backward()
    assert layers[0].lora_b.grad.any()
    assert not layers[1].lora_b.grad.any()


def test_gradients_are_not_copied_once_more_for_every_layer():
    model = make_model()
    with Operations() as found:
        weighted(model).backward()
    assert found.counts["aten::clone"] < len(model.adapted_layers())


def test_an_exception_in_a_forward_leaves_the_layers_on_their_own():
    model = make_model()
    layer = model.adapted_layers()["model.layers.1.mlp.up_proj"]

    def fail(*_: object) -> None:
        raise MemoryError

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        weighted(model)
    handle.remove()
    assert layer.gathered.of([layer]) is None
    weighted(model).backward()
