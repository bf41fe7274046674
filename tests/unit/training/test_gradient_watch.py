"""A layer that the loss does not depend on is found in the first step, however it is computed."""

from types import SimpleNamespace

import pytest
from support.architectures import save_model
from support.tiny_models import adapt, load_base, tiny_model, tokens
from torch import nn

from dora_dist.base_model.recomputation import recompute_first
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.regularizer import equilibrium_penalty
from dora_dist.training.gradient_watch import GradientWatch

IDS = tokens().remainder(80) + 4


def backward(model: nn.Module) -> None:
    """With the regularizer, from which all vectors have a gradient."""
    layers = model.adapted_layers().values()
    loss = model(input_ids=IDS, labels=IDS).loss
    (loss + equilibrium_penalty((layer.lora_a, layer.lora_b) for layer in layers)).backward()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model("gemma3 with a tower", tmp_path_factory.mktemp("models") / "gemma")


@pytest.mark.parametrize("train_gates", [True, False])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_layer_in_a_tower_that_no_image_goes_through_is_named(folder, quantization, train_gates):
    targets = ["fc1", "q_proj"]
    model = adapt(load_base(folder, quantization), target_modules=targets, train_gates=train_gates).train()
    watch = GradientWatch(model.adapted_layers())
    backward(model)
    tower = [name for name in model.adapted_layers() if "vision_tower" in name]
    assert all(model.adapted_layers()[name].lora_b.grad is not None for name in tower)
    with pytest.raises(
        ValueError, match=f"no gradient has come to {len(tower)} of {len(tower) + 2} adapted layers"
    ) as no:
        watch.check(Agreement())
    assert f"in the first step ({', '.join(tower[:3])}, ...)" in str(no.value)
    assert "leave them out of adapter.target_modules" in str(no.value)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_all_layers_of_a_decoder_are_reached_whatever_is_recomputed(fuse, recomputed):
    model = adapt(tiny_model(), fuse).train()
    recompute_first(model.get_base_model(), recomputed)
    watch = GradientWatch(model.adapted_layers())
    backward(model)
    watch.check(Agreement())
    assert not any(layer.on_gradient for layer in model.adapted_layers().values())


def test_what_is_watched_computes_the_same():
    gradients = []
    for watched in (False, True):
        model = adapt(tiny_model(), init="paper").train()
        if watched:
            GradientWatch(model.adapted_layers())
        backward(model)
        gradients.append([p.grad.tolist() for p in model.parameters() if p.requires_grad])
    assert gradients[0] == gradients[1]


def test_a_layer_of_an_expert_that_no_token_was_sent_to_is_no_mistake():
    watch = GradientWatch({name: SimpleNamespace() for name in ("mlp.experts.7.up_proj", "mlp.shared_experts.up_proj")})
    with pytest.raises(ValueError, match=r"1 of 2 adapted layers in the first step \(mlp.shared_experts.up_proj\)"):
        watch.check(Agreement())
