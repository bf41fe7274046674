"""Which layers are recomputed, by the allocator, and how many fit a card."""

import dataclasses

import pytest
from support.measured_memory import measure_peak, save_model, write_run
from transformers import LlamaConfig, TrainingArguments

from dora_dist.base_model.recomputation import recomputable_layers
from dora_dist.config.parse import load_config
from dora_dist.config.training import CHECKPOINTING
from dora_dist.memory.estimate import LEFT_FREE, estimate_memory

LAYERS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": LAYERS, "vocab_size": 512}
    save_model(folder / "model", LlamaConfig(**sizes, **attention))
    return write_run(folder / "run.yaml", folder / "model", 2, 256)


def recomputing(config, count):
    return load_config(config, ["--model.recompute_layers", str(count)])


def recompute_last_instead(model):
    """As many layers, from the other end."""
    layers = recomputable_layers(model.get_base_model())
    flags = [layer.gradient_checkpointing for layer in layers]
    for layer, flag in zip(layers, reversed(flags), strict=True):
        layer.gradient_checkpointing = flag


def test_the_first_layers_need_less_than_the_last_ones(config):
    half = recomputing(config, LAYERS // 2)
    first, last = measure_peak(half), measure_peak(half, recompute_last_instead)
    # The last layer is computed again while the first ones hold all that they keep: what one layer keeps comes on top.
    estimate = estimate_memory(half, 1, "cpu")
    assert last - first == pytest.approx(estimate.configured.recomputed, rel=0.1)


@pytest.mark.full("memory")
def test_the_last_layer_is_recomputed_for_nothing(config):
    assert measure_peak(recomputing(config, LAYERS - 1)) <= measure_peak(recomputing(config, "all"))


def test_every_layer_that_is_recomputed_lowers_the_peak(config):
    peaks = [estimate_memory(recomputing(config, count), 1, "cpu").peak_bytes for count in range(LAYERS)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == LAYERS


@pytest.mark.parametrize("count", [0, 1, LAYERS - 2])
def test_auto_recomputes_as_few_layers_as_fit_the_card(config, count):
    needed = estimate_memory(recomputing(config, count), 1).peak_bytes / (1 - LEFT_FREE)
    auto = recomputing(config, "auto")
    for card, expected in ((int(needed) + 2, count), (int(needed) - 2, count + 1)):
        found = estimate_memory(auto, 1, card=card)
        assert found.recomputation.count == expected
        assert found.peak_bytes == estimate_memory(recomputing(config, expected), 1).peak_bytes


def test_auto_recomputes_all_where_no_card_is_known_or_none_is_large_enough(config):
    auto = recomputing(config, "auto")
    for card in (None, 1000):
        assert estimate_memory(auto, 1, card=card).recomputation.count == LAYERS


def test_the_training_section_recomputes_all_or_nothing(config):
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for name in known.intersection(CHECKPOINTING):
        for given, count in (("true", LAYERS), ("false", 0)):
            settings = load_config(config, [f"--training.{name}", given])
            assert estimate_memory(settings, 1).recomputation.count == count
