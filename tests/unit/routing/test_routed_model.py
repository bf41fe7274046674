"""A model with routers: what it computes, for which tokens, and that a prompt is decided on once."""

import re

import pytest
import torch
from support.tiny_encoders import tiny_classifier
from support.tiny_models import (
    PROJECTIONS,
    adapt,
    decisions,
    load_base,
    loss_and_gradients,
    routed,
    shake,
    tiny_config,
    tiny_model,
    tokens,
    trainable,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from dora_dist.adapter.components import REENTRANT
from dora_dist.adapter.model import add_dynamic_lora
from dora_dist.base_model.recomputation import recompute_first
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.routing.model import add_routed_lora

LAYERS = 3
PROMPT = 5


def answered(ids):
    """Labels of rows whose first ``PROMPT`` tokens are the prompt."""
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    return labels


def probabilities(model):
    return torch.stack([decision.probabilities for decision in decisions(model)]).detach()


def chosen(model):
    return torch.stack([decision.chosen for decision in decisions(model)])


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_all_modules_at_uniform_routing_are_plain_lora(tmp_path, quantization):
    tiny_model().save_pretrained(tmp_path)
    model = routed(load_base(tmp_path, quantization), modules=7)
    with torch.no_grad():
        for router in model.routers:
            router.weight.zero_()
    plain = shake(adapt(load_base(tmp_path, quantization), fuse=False, initial_rank=2, alpha=2.0))
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_a_chosen_module_is_plain_lora_times_its_gate_and_the_others_are_the_base():
    model, ids = routed(), tokens(rows=4)
    found = logits_of(model, ids, labels=answered(ids))
    assert len(torch.unique(chosen(model).flatten(2), dim=1)[0]) > 1, "prompts that choose alike show little"
    for row in range(len(ids)):
        plain = shake(adapt(tiny_model(), fuse=False, initial_rank=2, alpha=2.0))
        layers = plain.adapted_layers()
        for block, names in enumerate(model.blocks):
            for index, name in enumerate(names):
                layers[name].gate.data.mul_(decisions(model)[block].gates[row, index])
        torch.testing.assert_close(found[row : row + 1], logits_of(plain, ids[row : row + 1]), rtol=1e-5, atol=1e-5)


def test_a_module_that_is_not_chosen_is_not_computed():
    model, ids = routed(), tokens(rows=1)
    expected = logits_of(model, ids)
    layers, count = model.adapted_layers(), 0
    for block, names in enumerate(model.blocks):
        for name, taken in zip(names, chosen(model)[block, 0], strict=True):
            if not taken:
                layers[name].lora_b.data.fill_(torch.nan)  # 0 times this is not 0
                count += 1
    assert count == 2 * (7 - 3)
    assert torch.equal(logits_of(model, ids), expected)


def test_every_parameter_has_a_gradient_which_is_0_where_no_prompt_has_chosen_the_module():
    """DDP waits for all of them."""
    model, ids = routed(), tokens(rows=1)
    model(input_ids=ids, labels=answered(ids)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    for block, names in enumerate(model.blocks):
        for name, taken in zip(names, chosen(model)[block, 0], strict=True):
            found = [value for parameter, value in gradients.items() if f".{name}." in parameter]
            assert len(found) == 3
            assert all(bool(gradient.any()) == bool(taken) for gradient in found), name
    assert all(gradients[f"routers.{block}.{part}"].any() for block in range(2) for part in ("pooler", "weight"))


def test_an_answer_does_not_change_what_is_chosen_for_its_prompt():
    model, ids = routed(), tokens(rows=3)
    logits_of(model, ids[:, :PROMPT])
    alone, choice = probabilities(model), chosen(model)
    logits_of(model, ids, labels=answered(ids))
    torch.testing.assert_close(probabilities(model), alone)
    assert torch.equal(chosen(model), choice)


def test_examples_of_a_packed_row_are_routed_as_alone():
    model, ids = routed(), tokens(rows=3)
    lengths = (7, 12, 9)
    parts = [(ids[row : row + 1, :length], answered(ids)[row : row + 1, :length]) for row, length in enumerate(lengths)]
    alone = []
    for part, labels in parts:
        found = logits_of(model, part, labels=labels)
        alone.append((found, probabilities(model), chosen(model)))
    packed = logits_of(
        model,
        torch.cat([part for part, _ in parts], 1),
        labels=torch.cat([labels for _, labels in parts], 1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
    )
    torch.testing.assert_close(packed, torch.cat([found for found, _, _ in alone], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities(model), torch.cat([found for _, found, _ in alone], 1))
    assert torch.equal(chosen(model), torch.cat([choice for _, _, choice in alone], 1))


@pytest.mark.parametrize("cache", [True, False])
def test_a_prompt_is_decided_on_once_with_and_without_a_cache(cache):
    model, ids = routed(), tokens(rows=2)
    calls = []
    for router in model.routers:
        router.register_forward_hook(lambda *_: calls.append(None))
    logits_of(model, ids)
    expected, choice = probabilities(model), chosen(model)
    calls.clear()
    output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
    assert output.shape == (2, 20)
    assert len(calls) == len(model.routers)
    torch.testing.assert_close(probabilities(model), expected)
    assert torch.equal(chosen(model), choice)
    # What was generated is what the whole text gives, where labels say which part of it was the prompt.
    labels = output.clone()
    labels[:, : ids.shape[1]] = IGNORED
    following = logits_of(model, output, labels=labels).argmax(2)[:, ids.shape[1] - 1 : -1]
    assert torch.equal(output[:, ids.shape[1] :], following)


def test_padding_on_the_left_changes_neither_routing_nor_answers():
    model, ids = routed(), tokens(rows=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    padded, mask = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.ones(2, 15, dtype=torch.int64)
    mask[1, :3] = 0
    padded[0, :3] = 7
    alone, choices = [], []
    for text in (padded[:1], ids[1:]):
        alone.append(model.generate(input_ids=text, **settings)[0, -6:])
        choices.append(chosen(model))
    together = model.generate(input_ids=padded, attention_mask=mask, **settings)[:, -6:]
    assert torch.equal(chosen(model), torch.cat(choices, 1))
    assert torch.equal(together, torch.stack(alone))


def test_beams_follow_their_prompt():
    model, ids = routed(), tokens(rows=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    cached, uncached = (model.generate(input_ids=ids, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, uncached)
    assert all(len(torch.unique(rows, dim=0)) == 1 for block in chosen(model) for rows in block.split(3))


def test_a_forward_from_a_cache_needs_to_know_the_prompt():
    model, ids = routed(), tokens()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"continues a cache of 8 tokens, .* use generate\(\), or .*one_prompt"):
            model(input_ids=ids[:, 8:], past_key_values=cache)
        with model.one_prompt():
            first = model(input_ids=ids[:, :8], use_cache=True)
            rest = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values).logits
    labels = ids.clone()
    labels[:, :8] = IGNORED
    torch.testing.assert_close(rest, logits_of(model, ids, labels=labels)[:, 8:], rtol=1e-4, atol=1e-5)


def test_other_rows_within_one_prompt_are_refused():
    model = routed()
    with model.one_prompt(), torch.no_grad():
        model(input_ids=tokens(rows=2))
        with pytest.raises(ValueError, match="a forward has 3 rows, but modules were chosen for 2 prompts"):
            model(input_ids=tokens(rows=3))


def test_a_prompt_that_is_read_in_chunks_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk_size is 4, but modules are chosen by the whole prompt"):
        routed().generate(input_ids=tokens(), max_new_tokens=2, prefill_chunk_size=4)


def recomputing(count):
    base = tiny_model(num_hidden_layers=LAYERS)
    recompute_first(base, count)
    return routed(base, dropout=0.1).train()


@pytest.mark.parametrize("hooks_again", [False, True])
@pytest.mark.parametrize("count", [2, LAYERS])
def test_recomputed_blocks_follow_the_same_choice_with_the_same_bits(monkeypatch, count, hooks_again):
    found = []
    for recomputed in (0, count):
        model = recomputing(recomputed)
        if hooks_again and recomputed:
            run_hooks_again(model, monkeypatch)
        torch.manual_seed(7)
        loss, gradients = loss_and_gradients(model)
        found.append([loss, *gradients.values()])
    for value, expected in zip(*found, strict=True):
        assert torch.equal(value, expected)


def run_hooks_again(model, monkeypatch):
    """Compute blocks again together with their hooks, as some versions of transformers do."""
    for block in model.get_base_model().model.layers[:LAYERS]:
        block.gradient_checkpointing = False
        kind = type(block)

    def call(self, *args, **kwargs):
        run = lambda *inputs: torch.nn.Module.__call__(self, *inputs, **kwargs)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

    monkeypatch.setattr(kind, "__call__", call)


def test_the_backward_of_an_earlier_forward_is_refused_where_blocks_are_recomputed():
    model = recomputing(LAYERS)
    first = model(input_ids=tokens(), labels=tokens()).loss
    model(input_ids=tokens(seed=3), labels=tokens(seed=3))
    with pytest.raises(RuntimeError, match="the backward of forward 0 comes after forward 1"):
        first.backward()
    model = recomputing(0)
    first = model(input_ids=tokens(), labels=tokens()).loss
    model(input_ids=tokens(seed=3), labels=tokens(seed=3))
    first.backward()


def test_the_reentrant_kind_of_checkpointing_is_refused():
    base = tiny_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    with pytest.raises(ValueError, match=re.escape(REENTRANT)):
        routed(base).train()(input_ids=tokens(), labels=tokens())


def test_the_adapter_switched_off_is_the_base():
    model, ids = routed(), tokens()
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), logits_of(tiny_model(), ids))


def test_routers_are_trained_and_saved_beside_the_adapter():
    model = routed()
    names = {f"routers.{block}.{part}" for block in range(2) for part in ("pooler", "weight")}
    assert model.head_parameters().keys() == names
    assert names <= trainable(model).keys() & model.state_dict().keys()
    assert {parameter.dtype for parameter in routed(dtype="float64").head_parameters().values()} == {torch.float64}


def test_a_routed_adapter_is_never_merged():
    with pytest.raises(ValueError, match=r"adapter.routing is prompt, .* cannot be merged"):
        routed().merge_and_unload()


def test_what_cannot_be_routed_is_refused():
    config = DynamicLoraConfig(target_rank=2, initial_rank=2, routing="prompt")
    with pytest.raises(ValueError, match=r"config.routing is prompt, but .* call dora_dist.add_routed_lora"):
        add_dynamic_lora(tiny_model(), config)
    with pytest.raises(ValueError, match="routing is none, but must be prompt"):
        add_routed_lora(tiny_model(), DynamicLoraConfig())
    with pytest.raises(ValueError, match="is for sequence_classification, but routing prompt is for causal_lm"):
        add_routed_lora(tiny_classifier(), config)


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (["q_proj", "v_proj"], 3, "adapter.modules_per_prompt is 3, but the decoder blocks have 2 adapted modules"),
        (r"model\.layers\.0\..*|.*q_proj", 2, "have 1 or 7 adapted modules: all must have the same number"),
        ("all-linear", 8, "adapter.modules_per_prompt is 8, but the decoder blocks have 7 adapted modules"),
    ],
)
def test_blocks_with_too_few_or_different_modules_are_refused(targets, modules, message):
    with pytest.raises(ValueError, match=message):
        routed(target_modules=targets, modules=modules)


def test_at_llama_2_7b_the_numbers_of_parameters_are_those_of_the_paper():
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=32))
        model = add_routed_lora(base, DynamicLoraConfig(target_rank=32, initial_rank=32, routing="prompt"))
    layers = model.adapted_layers().values()
    assert sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers) == 79_953_920
    assert sum(router.weight.numel() for router in model.routers) == 917_504
    assert sum(router.pooler.numel() for router in model.routers) == 131_072
    assert [name.rsplit(".", 1)[-1] for name in model.blocks[0]] == [
        "down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    assert set(PROJECTIONS) == {name.rsplit(".", 1)[-1] for name in model.blocks[31]}
    gates = sum(layer.gate.numel() for layer in layers)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == 79_953_920 + 917_504 + 131_072 + gates


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma"])
def test_other_architectures_are_routed(architecture):
    base = AutoModelForCausalLM.from_config(tiny_config(architecture))
    model, ids = routed(base), tokens()
    cached, uncached = (
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert chosen(model).sum(2).unique().tolist() == [3]
