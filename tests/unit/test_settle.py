"""From a configuration to the parts of a run: what is refused before a model is read, and what a run is known by."""

import json

import pytest
import torch
from accelerate import PartialState
from tiny_run import tiny_tokenizer, write_config

from dora_dist import build
from dora_dist.config import load_config
from dora_dist.training_section import OWNED_TRAINING_ARGUMENTS


@pytest.fixture(autouse=True)
def one_process():
    """The process state that the entry point sets up first."""
    PartialState()


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def load(config, *overrides):
    return load_config(config, ["--distributed.engine", "none", *overrides])


def fingerprint(settings):
    data = build.load_data(settings.data, tiny_tokenizer(), settings.data.train)
    return build.fingerprint(settings, build.training_arguments(settings, len(data.examples)), data)


def test_the_seed_of_the_run_is_the_seed_of_the_adapter_unless_it_has_its_own(config):
    models = {
        seeds: build.load_model(load(config, *seeds), torch.device("cpu"), tiny_tokenizer())
        for seeds in [("--seed", "7"), ("--seed", "8"), ("--seed", "8", "--adapter.seed", "7")]
    }
    first, second, third = (next(iter(model.adapted_layers().values())).lora_a for model in models.values())
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--adapter.target_modules", "[nonsense]"], "matches no linear layer; there are .*down_proj"),
        (["--training.max_steps", "2"], "2 optimizer steps with warmup_fraction 0.15"),
        (["--distributed.engine", "zero2", "--adapter.dtype", "bfloat16"], "adapter.dtype is bfloat16, but DeepSpeed"),
    ],
)
def test_a_method_that_cannot_work_is_refused_without_reading_weights(config, overrides, message):
    settings = load(config, *overrides)
    (config.parent / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        build.check_method(settings, settings.training["max_steps"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.save_strategy", "epoch"], "save_strategy is epoch, .*save_steps"),
        (["--training.per_device_train_batch_size", "51"], "50 training examples do not fill one global batch of 51"),
        (["--model.compute_dtype", "bfloat16"], "there is no GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those of a machine without a GPU")
def test_training_settings_that_cannot_work_are_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        build.training_arguments(load(config, *overrides), 50)


def test_evaluation_during_training_needs_held_out_data(config):
    with pytest.raises(ValueError, match=r"eval_strategy is steps, but data\.eval is not set"):
        build.training_arguments(load(config, "--training.eval_strategy", "steps", "--data.eval", "null"), 50)


def test_what_the_program_sets_is_refused_in_the_configuration(config, monkeypatch):
    """Otherwise a user who sets it gets an error about a keyword given twice."""
    seen = {}
    monkeypatch.setattr(build, "TrainingArguments", lambda **values: seen.update(values) or pytest.skip.Exception)
    with pytest.raises(AttributeError):
        build.training_arguments(load(config), 50)
    given = {*build.DEFAULT_TRAINING_ARGUMENTS, *load(config).training, "dataloader_pin_memory"}
    assert set(seen) - given <= set(OWNED_TRAINING_ARGUMENTS)


def test_the_fingerprint_knows_the_content_of_the_data(config):
    before = fingerprint(load(config))
    rows = (config.parent / "train.jsonl").read_text().splitlines()
    changed = json.loads(rows[7])
    changed["output"] += " w3"
    rows[7] = json.dumps(changed)
    (config.parent / "train.jsonl").write_text("\n".join(rows))
    after = fingerprint(load(config))
    assert {name for name in before if before[name] != after[name]} == {"training data"}


def test_dropped_examples_are_counted_aloud(config, capsys):
    settings = load(config, "--data.max_length", "16", "--data.overlong", "drop")
    data = build.load_data(settings.data, tiny_tokenizer(), settings.data.train)
    assert 0 < data.num_dropped < 50
    assert f"dropped {data.num_dropped} of 50 examples, longer than data.max_length 16" in capsys.readouterr().err
