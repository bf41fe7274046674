"""What a model writes does not depend on its own settings of generation."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_encoders import tiny_summarizer
from support.tiny_models import adapt, routed, tiny_model

from dora_dist.evaluation.generation import generate

OF_BASE = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 9,
    "suppress_tokens": list(range(10, 40)),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 5.0,
    "min_p": 0.9,
}
PROMPTS = torch.tensor([[1, 7, 8, 9], [1, 20, 30, 31]])


def with_settings(model):
    settings = model.get_base_model().generation_config
    settings.update(**OF_BASE)
    return settings


def of_stock_peft():
    return get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("make", [lambda: adapt(tiny_model()), routed, of_stock_peft], ids=["ours", "routed", "PEFT"])
def test_greedy_is_the_most_likely_token_whatever_the_base_has_set(make):
    model = make().eval()
    options = {"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS), "max_new_tokens": 12}
    options |= {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": 2}
    wanted = generate(model, **options)
    settings = with_settings(model)
    before = copy.deepcopy(settings.to_dict())
    assert torch.equal(generate(model, **options), wanted)
    assert not torch.equal(model.generate(**options)[:, : wanted.shape[1]], wanted), "or the settings show nothing"
    assert model.get_base_model().generation_config is settings
    assert settings.to_dict() == before


def test_the_decoder_of_a_summarizer_begins_as_in_training_and_is_told_nothing_else():
    model = adapt(tiny_summarizer()).eval()
    options = {"input_ids": PROMPTS % 20, "attention_mask": torch.ones_like(PROMPTS), "max_new_tokens": 8}
    written = generate(model, **options, do_sample=False, num_beams=1)
    assert written[:, 0].tolist() == [2, 2]
    ids, ended = torch.full((2, 1), 2), torch.zeros(2, 1, dtype=torch.bool)
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=options["input_ids"], decoder_input_ids=ids).logits[:, -1]
        following = logits.argmax(1, keepdim=True).masked_fill(ended, 0)
        ids, ended = torch.cat([ids, following], 1), ended | (following == 2)
    assert torch.equal(written, ids[:, : written.shape[1]])
    beams = generate(model, **options, do_sample=False, num_beams=3)
    with_settings(model)
    assert torch.equal(generate(model, **options, do_sample=False, num_beams=1), written)
    assert torch.equal(generate(model, **options, do_sample=False, num_beams=3), beams)


def test_a_model_has_its_settings_again_after_a_failure():
    model = adapt(tiny_model())
    settings = with_settings(model)
    with pytest.raises(ValueError, match="unknown_option"):
        generate(model, input_ids=PROMPTS, unknown_option=1)
    assert model.get_base_model().generation_config is settings
