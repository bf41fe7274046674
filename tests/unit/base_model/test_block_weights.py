"""What of a model's blocks is adapted and quantized, and what is said of the rest."""

import pytest
from support.architectures import skeleton_of
from support.tiny_models import tiny_model

from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.block_weights import check_quantized, describe_left_out, left_out
from dora_dist.config.adapter import DynamicLoraConfig

ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64
EXPERTS = {"gate_up_proj": 4 * 2 * 64 * 128, "down_proj": 4 * 64 * 128, "gate": 4 * 64}
"""Of a block of the tiny Mixtral, in elements."""


def test_fused_experts_are_named_with_their_share():
    mixtral = skeleton_of("mixtral")
    names = resolve_targets(mixtral, "all-linear")
    shares = left_out(mixtral, names)
    total = ATTENTION + sum(EXPERTS.values())
    assert list(shares) == [
        f"model.layers.*.mlp.{kind}" for kind in ("experts.gate_up_proj", "experts.down_proj", "gate")
    ]
    assert list(shares.values()) == [pytest.approx(size / total) for size in EXPERTS.values()]
    said = describe_left_out(mixtral, DynamicLoraConfig(), names)
    assert said.startswith(
        "all-linear leaves out 88.9% of the block weights: model.layers.*.mlp.experts.gate_up_proj 59.1%"
    )
    named = DynamicLoraConfig(target_modules=["q_proj"])
    assert describe_left_out(mixtral, named, ["model.layers.0.self_attn.q_proj"]) is None


def test_a_tower_is_one_part():
    gemma = skeleton_of("gemma3 with a tower")
    assert list(left_out(gemma, resolve_targets(gemma, "all-linear"))) == ["model.vision_tower"]


def test_nothing_is_said_of_a_model_that_is_adapted_as_a_whole():
    llama = tiny_model()
    assert describe_left_out(llama, DynamicLoraConfig(), resolve_targets(llama, "all-linear")) is None


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_stays_in_16_bits_for_the_most_part_is_not_quantized_without_leave(quantization):
    mixtral = skeleton_of("mixtral")
    with pytest.raises(
        ValueError, match=rf"{quantization}, but 88\.9% .*gate_up_proj 59\.1%.*model\.allow_unquantized"
    ):
        check_quantized(mixtral, quantization, allow_unquantized=False)
    check_quantized(mixtral, quantization, allow_unquantized=True)
    check_quantized(mixtral, "none", allow_unquantized=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2", "gemma3 with a tower"])
def test_a_base_that_is_quantized_for_the_most_part_passes(name):
    check_quantized(skeleton_of(name), "nf4", allow_unquantized=False)


def test_linear_layers_of_a_class_of_their_own_stay_in_16_bits():
    with pytest.raises(ValueError, match=r"100\.0% of the block weights would stay in 16 bits"):
        check_quantized(skeleton_of("falcon"), "nf4", allow_unquantized=False)
