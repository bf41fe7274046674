"""Names of layers as real architectures have them, and what all who ask for a layer's block make of them."""

import pytest
from torch import nn

from dora_dist.base_model.block_weights import left_out
from dora_dist.method.layer_names import split_name, without_numbers
from dora_dist.method.ranks import rising_with_depth


@pytest.mark.parametrize(
    ("name", "block", "parts"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0", ("model.layers", 0, "self_attn.q_proj")),
        ("model.layers.11.mlp.up_proj", "model.layers.11", ("model.layers", 11, "mlp.up_proj")),
        ("model.layers.12.mlp.experts.4.up_proj", "model.layers.12", ("model.layers", 12, "mlp.experts.4.up_proj")),
        ("transformer.h.3.attn.c_attn", "transformer.h.3", ("transformer.h", 3, "attn.c_attn")),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0", ("encoder.block", 0, "layer.0.SelfAttention.q")),
        (
            "decoder.block.2.layer.1.EncDecAttention.q",
            "decoder.block.2",
            ("decoder.block", 2, "layer.1.EncDecAttention.q"),
        ),
        (
            "bert.encoder.layer.11.attention.output.dense",
            "bert.encoder.layer.11",
            ("bert.encoder.layer", 11, "attention.output.dense"),
        ),
        ("3.mlp.up", "3", ("", 3, "mlp.up")),
        ("blocks.7", "", ("", None, "blocks.7")),
        ("lm_head2.out", "", ("", None, "lm_head2.out")),
        ("classifier", "", ("", None, "classifier")),
        ("", "", ("", None, "")),
    ],
)
def test_a_name_is_split_at_the_first_number_that_something_follows(name, block, parts):
    assert split_name(name) == parts
    assert split_name(name).block == block


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.mlp.experts.4.up_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
        ("3.mlp.up", "*.mlp.up"),
        ("lm_head2.out", "lm_head2.out"),
    ],
)
def test_layers_of_a_kind_have_one_name_without_numbers(name, kind):
    assert without_numbers(name) == kind


def test_blocks_that_are_the_models_own_numbered_parts_are_blocks_to_all_who_ask():
    """And a layer that is a numbered part itself, of a projector say, is in no block."""
    block = nn.ModuleDict({"up": nn.Linear(2, 3)})
    model = nn.ModuleDict(
        {"0": block, "1": nn.ModuleDict({"up": nn.Linear(2, 3)}), "projector": nn.Sequential(nn.Linear(2, 2))}
    )
    assert left_out(model, ["0.up"]) == {"*.up": 0.5}
    assert rising_with_depth(["0.up", "1.up"]) == {"0.up": 0.5, "1.up": 1.5}
