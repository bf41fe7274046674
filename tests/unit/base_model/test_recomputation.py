"""Layers that are computed again in the backward: which they are, and that the numbers are the same bits."""

import pytest
import torch
from support.architectures import save_model
from support.tiny_encoders import tiny_classifier, tiny_summarizer
from support.tiny_models import adamw_losses, adapt, loss_and_gradients, shake, tiny_model, trainable
from torch import nn

from dora_dist.base_model.load import BaseModelSpec, load_base_model, load_skeleton
from dora_dist.base_model.recomputation import number_of_recomputed, recomputable_layers, recompute_first

LAYERS = 3


def recomputing(count, quantization=None, fuse=True, dropout=0.1):
    """An adapted model of three layers that recomputes ``count`` of them, with a random adapter."""
    base = tiny_model(num_hidden_layers=LAYERS) if quantization is None else quantization()
    recompute_first(base, count)
    return shake(adapt(base, fuse, dropout=dropout)).train()


def forwards(model):
    """Layer -> how often it is computed in a forward and its backward."""
    counts = [0] * LAYERS
    for number, layer in enumerate(recomputable_layers(model.get_base_model())):
        layer.self_attn.register_forward_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    loss_and_gradients(model)
    return counts


@pytest.mark.parametrize("count", range(LAYERS + 1))
def test_the_first_layers_are_computed_twice_and_the_others_once(count):
    assert forwards(recomputing(count)) == [2] * count + [1] * (LAYERS - count)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_loss_gradients_and_steps_are_the_same_bits(tmp_path, quantization, fuse):
    tiny_model(num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    spec = BaseModelSpec(path=str(tmp_path), quantization=quantization)
    courses = []
    for count in range(LAYERS + 1):
        model = recomputing(count, lambda: load_base_model(spec), fuse)
        torch.manual_seed(7)
        loss, gradients = loss_and_gradients(model)
        assert all(gradient.any() for gradient in gradients.values())
        losses = list(adamw_losses(model, 3))
        courses.append([loss, *gradients.values(), *losses, *trainable(model).values()])
    for course in courses[1:]:
        for found, expected in zip(course, courses[0], strict=True):
            assert torch.equal(found, expected)


def test_dropout_makes_the_numbers_depend_on_the_random_state():
    """Otherwise equal bits above would say nothing about dropout."""
    model = recomputing(1)
    torch.manual_seed(7)
    once, _ = loss_and_gradients(model)
    assert not torch.equal(once, loss_and_gradients(model)[0])


def test_layers_of_encoder_and_decoder_and_of_an_encoder_count():
    for model, number in ((tiny_summarizer("bart"), 4), (tiny_summarizer("t5"), 4), (tiny_classifier("roberta"), 2)):
        assert len(recomputable_layers(model)) == number


def test_layers_of_a_tower_do_not_count(tmp_path):
    skeleton = load_skeleton(BaseModelSpec(path=str(save_model("gemma3 with a tower", tmp_path))))
    names = {id(module): name for name, module in skeleton.named_modules()}
    found = [names[id(layer)] for layer in recomputable_layers(skeleton)]
    assert len(found) == 2
    assert not [name for name in found if "vision" in name]


def test_a_number_is_what_was_asked_for():
    layers = [nn.Identity()] * 4
    for setting, count in (("none", 0), ("all", 4), (0, 0), (3, 3), (4, 4)):
        assert number_of_recomputed(setting, layers, "base") == count
    with pytest.raises(ValueError, match=r"model\.recompute_layers is 5, but base has 4 layers: set it to all"):
        number_of_recomputed(5, layers, "base")


def test_a_model_whose_layers_cannot_be_recomputed_one_by_one_is_refused():
    assert number_of_recomputed("none", [], "base") == 0
    for setting in ("all", 2):
        with pytest.raises(
            ValueError, match=f"recompute_layers is {setting}, but the layers of base cannot be computed"
        ):
            number_of_recomputed(setting, [], "base")
