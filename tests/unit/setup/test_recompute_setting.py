"""How many layers a run recomputes, decided before a weight is read."""

import pytest
import torch
from support.resolved_run import load, resolved
from support.tiny_encoders import write_classification
from support.tiny_models import SIZES
from support.tiny_run import tiny_tokenizer
from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM

from dora_dist.base_model.recomputation import Recomputation, recomputable_layers
from dora_dist.memory.estimate import LEFT_FREE, estimate_memory
from dora_dist.setup import build, recomputation
from dora_dist.setup.describe import banner, describe

PLENTY = 2**40


@pytest.mark.parametrize(
    ("overrides", "card", "count"),
    [
        ([], PLENTY, 0),
        (["--training.gradient_checkpointing", "true"], PLENTY, 2),
        (["--model.recompute_layers", "all"], PLENTY, 2),
        (["--model.recompute_layers", "none"], None, 0),
        (["--model.recompute_layers", "1"], None, 1),
        (["--model.recompute_layers", "auto"], PLENTY, 0),
        (["--model.recompute_layers", "auto"], None, 2),
    ],
)
def test_what_is_configured_is_decided_and_said(config, overrides, card, count):
    settings = load(config, *overrides)
    run = resolved(settings, card)
    assert run.recomputation == Recomputation(count, 2)
    assert f"recomputes the activations of {count} of 2 layers in the backward pass" in banner(settings, run, 1)
    title = {0: "none *", 1: "1 of 2 *", 2: "all *"}[count]
    assert title in describe(settings, run, 1)
    # The Trainer would set the flags of all layers, and warn of the name that is deprecated.
    assert run.arguments.gradient_checkpointing == ("--training.gradient_checkpointing" in overrides)


def test_the_kind_is_the_same_whatever_else_is_asked_of_the_trainer(config):
    options = ["--training.gradient_checkpointing_kwargs", "{determinism_check: none}"]
    run = resolved(load(config, "--training.gradient_checkpointing", "true", *options))
    expected = {"use_reentrant": False, "determinism_check": "none"}
    assert run.arguments.gradient_checkpointing_kwargs == expected


def test_auto_reckons_with_the_longest_row_that_there_is(config):
    settings = load(config, "--model.recompute_layers", "auto")
    run = resolved(settings, PLENTY)
    longest = recomputation.with_longest_row(settings, run.data.train)
    assert longest.data.max_length == max(run.data.train[0].lengths()) < settings.data.max_length
    card = int(estimate_memory(longest, 1, card=PLENTY).peak_bytes / (1 - LEFT_FREE)) + 2
    assert resolved(settings, card).recomputation.count == 0
    assert resolved(settings, card - 4).recomputation.count > 0
    packed = load(config, "--data.batching", "packed", "--data.max_length", "64")
    assert recomputation.with_longest_row(packed, run.data.train) is packed


def test_a_card_that_is_too_small_is_said_before_the_run(config):
    run = resolved(load(config, "--model.recompute_layers", "auto"), 2**16)
    assert run.recomputation.count == 2
    (remark,) = [remark for remark in run.remarks() if "though all layers are recomputed" in remark]
    assert "leaves less than 15% of the 64.0 KiB of the smallest GPU free" in remark
    assert "lower training.per_device_train_batch_size" in remark


def test_auto_recomputes_all_where_there_is_no_estimate(tmp_path):
    run = resolved(load(write_classification(tmp_path), "--model.recompute_layers", "auto"), PLENTY)
    assert run.recomputation == Recomputation(2, 2)


def test_more_layers_than_there_are_are_refused(config):
    for decide in (resolved, lambda settings: estimate_memory(settings, 1)):
        with pytest.raises(ValueError, match=r"model\.recompute_layers is 3, but .*model has 2 layers: set it to all"):
            decide(load(config, "--model.recompute_layers", "3"))


@pytest.mark.parametrize("setting", ["auto", "all", "1"])
def test_a_model_whose_layers_are_not_transformers_kind_is_refused(config, setting):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    folder = config.parent / "model"
    GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(**sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the layers of .*model cannot be computed again one by one .*set it to none"):
        resolved(load(config, "--model.recompute_layers", setting))
    assert resolved(load(config, "--model.recompute_layers", "none")).recomputation == Recomputation(0, 0)


def test_a_resumed_run_may_recompute_another_number(config):
    fingerprints = [resolved(load(config, "--model.recompute_layers", count)).fingerprint for count in ("none", "1")]
    assert fingerprints[0] == fingerprints[1] == resolved(load(config)).fingerprint


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_layers_decided_are_the_layers_recomputed(config, count):
    settings = load(config, "--model.recompute_layers", str(count))
    model = build.load_model(settings, torch.device("cpu"), tiny_tokenizer())
    recomputation.apply_recomputation(settings, model.get_base_model(), resolved(settings).recomputation)
    flags = [layer.gradient_checkpointing for layer in recomputable_layers(model.get_base_model())]
    assert flags == [True] * count + [False] * (2 - count)
