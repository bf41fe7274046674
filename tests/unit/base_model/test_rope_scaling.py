"""Rotary positions that are scaled: as transformers scales them, and as far as they go."""

import pytest
import torch
from support.tiny_models import logits, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dora_dist.base_model.load import BaseModelSpec, load_base_model, load_skeleton
from dora_dist.config.model import ModelConfig
from dora_dist.setup.resolve import context_of

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path)  # of 64 positions
    return str(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (YARN, 256),
        ({"rope_type": "linear", "factor": 2}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (LLAMA3, 512),
    ],
)
def test_it_is_what_transformers_makes_of_the_same_parameters(scaling, positions, base):
    spec = BaseModelSpec(path=base, quantization="none", rope_scaling=scaling)
    model = load_base_model(spec)
    original = scaling.get("original_max_position_embeddings", 64)
    config = LlamaConfig.from_pretrained(base)
    config.max_position_embeddings = positions
    extra = {} if scaling["rope_type"] == "linear" else {"original_max_position_embeddings": original}
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling, **extra}
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base, config=config)))
    assert not torch.equal(logits(model), logits(load_base_model(BaseModelSpec(path=base, quantization="none"))))
    assert context_of(load_skeleton(spec)) == positions


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is dynamic, but must be one of linear, yarn, llama3"),
        ({"factor": 2.0}, "rope_type is None, but must be one of"),
        ({"rope_type": "yarn"}, "factor is None, but must be a number, which rope_type yarn needs"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is None, but must be a number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is 2, but must be a number"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5, but must be at least 1"),
        ({"rope_type": ["yarn"], "factor": 2}, "rope_type is .*yarn.*, but must be one of"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor is inf, but must be a number, and finite"),
        ({**YARN, "beta_fast": "x"}, "beta_fast is x, but must be a number"),
        (
            {**YARN, "original_max_position_embeddings": -1},
            "original_max.* is -1, but must be a whole",
        ),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is 4.0, but must be less than high_freq_factor, 4.0"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_configuration(scaling, message):
    with pytest.raises(ValueError, match=f"model.rope_scaling: {message}"):
        ModelConfig(path="anywhere", rope_scaling=scaling)


def test_a_key_that_is_not_read_is_refused():
    with pytest.raises(ValueError, match=r"has 'atention_factor', which .* yarn does not read; did you mean atte"):
        ModelConfig(path="anywhere", rope_scaling={**YARN, "atention_factor": 3})


def test_a_model_does_not_lose_positions(base):
    scaling = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=r"factor 1.5, of 32 .* makes 48; .* has 64 already: .* more than 2, or"):
        load_skeleton(BaseModelSpec(path=base, quantization="none", rope_scaling=scaling))


def test_a_model_without_rotary_positions_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no rotary positions"):
        load_skeleton(BaseModelSpec(path=str(tmp_path), rope_scaling=YARN))
