"""A prompt-routed adapter on disk: written, read, and refused where it does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import adapt, decisions, load_base, logits, routed, shake, tiny_model

import dora_dist
from dora_dist.adapter.card import CARD
from dora_dist.config.format_version import ROUTED_ADAPTER
from dora_dist.routing.files import TENSORS


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    routed().save_pretrained(folder)
    return folder


def change(folder, **values):
    about = json.loads((folder / ROUTED_ADAPTER).read_text())
    (folder / ROUTED_ADAPTER).write_text(json.dumps({**about, **values}))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_saved_loads_as_the_same_model(tmp_path, quantization):
    tiny_model().save_pretrained(tmp_path / "base")
    model = routed(load_base(tmp_path / "base", quantization), alpha=3.0)
    next(iter(model.adapted_layers().values())).component_mask[1] = False
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = dora_dist.load_adapter(load_base(tmp_path / "base", quantization), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, *([one.chosen for one in decisions(each)] for each in (model, loaded))))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_folder_says_what_it_is(folder):
    about = json.loads((folder / ROUTED_ADAPTER).read_text())
    assert (about["format"], about["modules_per_prompt"]) == (1, 3)
    assert [len(names) for names in about["blocks"]] == [7, 7]
    tensors = load_file(folder / TENSORS)
    assert tensors["routers.1.weight"].shape == (7, 64)
    assert tensors["routers.1.pooler"].shape == (64,)
    assert tensors["model.layers.0.mlp.down_proj.lora_A"].shape == (2, 128)
    assert len(tensors) == 2 * (7 * 2 + 2)
    assert {path.name for path in folder.iterdir()} == {ROUTED_ADAPTER, TENSORS, CARD}, (
        "nothing that PEFT would take for its own"
    )


def test_a_plain_adapter_is_read_too(tmp_path):
    plain = shake(adapt(tiny_model()))
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(dora_dist.load_adapter(tiny_model(), tmp_path)), logits(plain))


def test_another_format_is_refused(folder):
    change(folder, format=2)
    with pytest.raises(ValueError, match="has format 2, but this version of dora-dist reads format 1"):
        dora_dist.load_adapter(tiny_model(), folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter: give the folder adapter/ of a run"):
        dora_dist.load_adapter(tiny_model(), tmp_path)


def test_a_folder_that_is_not_whole_is_refused(folder):
    tensors = load_file(folder / TENSORS)
    del tensors["routers.0.pooler"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match=r"does not fit routed_adapter.json \(first difference routers.0.pooler\)"):
        dora_dist.load_adapter(tiny_model(), folder)
    (folder / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"has no routed_adapter.safetensors beside its routed_adapter.json"):
        dora_dist.load_adapter(tiny_model(), folder)


@pytest.mark.parametrize(
    ("other", "there"),
    [({"num_hidden_layers": 1}, "not there in this LlamaForCausalLM"), ({"intermediate_size": 96}, "96x64 in this")],
)
def test_another_base_is_refused(folder, other, there):
    with pytest.raises(ValueError, match=rf"is for model\.layers\..*, which is {there}.*: give the base"):
        dora_dist.load_adapter(tiny_model(**other), folder)


def test_modules_in_another_order_are_refused(folder):
    blocks = json.loads((folder / ROUTED_ADAPTER).read_text())["blocks"]
    change(folder, blocks=[block[::-1] for block in blocks])
    with pytest.raises(ValueError, match="has its modules in other blocks than this LlamaForCausalLM"):
        dora_dist.load_adapter(tiny_model(), folder)
