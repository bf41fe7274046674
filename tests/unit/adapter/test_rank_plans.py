"""Layers of different ranks: from a plan, or from what a generator makes of the model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tiny_models import adapt, logits, loss_and_gradients, shake, tiny_model

from dora_dist.adapter.ranks import read_plan, resolve_ranks, write_plan
from dora_dist.config.adapter import DynamicLoraConfig

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def cost_of(model, ranks):
    linears = {name: model.get_submodule(name) for name in ranks}
    return sum(rank * (linears[name].in_features + linears[name].out_features) for name, rank in ranks.items())


def plan_of(ranks):
    return json.dumps({"format_version": 1, "ranks": ranks})


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, {Q: 3, UP: 1, "model.layers.0.self_attn.v_proj": 0}, {"model": "any"})
    return str(path)


@pytest.mark.parametrize("generator", ["mlp-only", "rising-with-depth", "strata"])
def test_a_generator_spends_what_uniform_ranks_cost(generator):
    model = tiny_model()
    uniform = resolve_ranks(model, DynamicLoraConfig(target_rank=3, initial_rank=3))
    ranks = resolve_ranks(model, DynamicLoraConfig(target_rank=3, ranks=generator))
    left = cost_of(model, uniform) - cost_of(model, ranks)
    assert 0 <= left < 64 + 128, "more than a component of the widest layer"
    assert len(set(ranks.values())) > 1
    if generator == "mlp-only":
        assert {name.rsplit(".", 1)[1] for name in ranks} == {"gate_proj", "up_proj", "down_proj"}
    else:
        assert ranks["model.layers.0.mlp.up_proj"] < ranks["model.layers.1.mlp.up_proj"]


def test_a_plan_decides_which_layers_have_components_and_how_many(plan):
    model = adapt(tiny_model(), ranks=plan)
    assert {name: len(layer.gate) for name, layer in model.adapted_layers().items()} == {Q: 3, UP: 1}


def test_layers_of_different_ranks_are_fused_and_saved_exactly(tmp_path):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    folders = ["self_attn"] * 4 + ["mlp"] * 3
    ranks = {
        f"model.layers.{block}.{folder}.{kind}": 1 + (block + number) % 4
        for block in range(2)
        for number, (folder, kind) in enumerate(zip(folders, kinds, strict=True))
    }
    write_plan(tmp_path / "plan.json", ranks, {})
    models = [shake(adapt(tiny_model(), fuse, ranks=str(tmp_path / "plan.json"))) for fuse in (True, False)]
    (loss, gradients), (same_loss, same_gradients) = map(loss_and_gradients, models)
    torch.testing.assert_close(loss, same_loss)
    torch.testing.assert_close(gradients, same_gradients)
    models[0].save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(models[0].eval()))


@pytest.mark.parametrize(("scale", "expected"), [("constant", [6 / 2, 6 / 2]), ("sqrt_rank", [6.0, 6 / 3**0.5])])
def test_the_scale_of_a_layer(plan, scale, expected):
    layers = adapt(tiny_model(), ranks=plan, alpha=6.0, scale=scale).adapted_layers()
    assert [layers[UP].scale, layers[Q].scale] == expected


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (None, "there is no such file: give uniform, mlp-only, rising-with-depth, strata, .*, or the path of a plan"),
        ("{", "is no JSON"),
        ("[1]", "is no plan"),
        (plan_of({}), "is no plan"),
        (plan_of({Q: 1.5}), "is no plan"),
        (plan_of({Q: -1}), "is no plan"),
        (json.dumps({"ranks": {Q: 1}}), "has format_version None, but this version of dora-dist reads 1"),
        (plan_of({Q: 0}), "gives no layer a component"),
        (plan_of({Q: 65}), "the rank 65, but 64 is the largest"),
        (plan_of({"h.0.q": 1}), "names h.0.q .1 of 1 layers.*the plan is of another model"),
    ],
)
def test_what_is_no_plan_of_this_model_is_refused(tmp_path, written, says):
    path = tmp_path / "plan.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(ValueError, match=f"(?s)adapter.ranks.*plan.json.*{says}"):
        resolve_ranks(tiny_model(), DynamicLoraConfig(ranks=str(path)))


def test_a_generator_that_can_make_nothing_of_the_layers_is_refused():
    config = DynamicLoraConfig(target_modules=["q_proj"], ranks="mlp-only")
    with pytest.raises(ValueError, match=r"adapter\.ranks is mlp-only, but all adapted layers are in attentions"):
        resolve_ranks(tiny_model(), config)


def test_a_plan_is_read_as_it_was_written(plan):
    assert read_plan(Path(plan)) == {
        UP: 1,
        "model.layers.0.self_attn.v_proj": 0,
        Q: 3,
    }
    assert json.loads(Path(plan).read_text())["origin"] == {"model": "any"}
