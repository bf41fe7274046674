"""Text of a configuration stays what its author has written, in files, on command lines and in comparisons."""

import pytest

from dora_dist.config.parse import config_of, config_text, load_config

LEAST = {"output_dir": "output_dir: runs/x", "model": "model: {path: some/model}", "data": "data: {train: rows.jsonl}"}


@pytest.fixture
def load(tmp_path):
    def load(added="", *overrides):
        path = tmp_path / "run.yaml"
        missing = [line for key, line in LEAST.items() if f"{key}:" not in added]
        path.write_text("\n".join([*missing, added]))
        return load_config(path, overrides)

    return load


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
@pytest.mark.parametrize("value", ['"no"', "no", "off", "'no'"])
def test_a_strategy_can_be_no_quoted_or_not(load, tmp_path, name, value):
    for config in (
        load(f"training:\n  {name}: {value}\n"),
        load("", f"--training.{name}", value),
        load("", f"--training.{name}={value}"),
        load("", "--training", f"{{{name}: {value}}}"),
        load(f"training:\n  {name}: steps\n", f"--training.{name}", value),
    ):
        assert config.training == {name: "no"}
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("added", "found"),
    [
        ("training: {run_name: '12', lr_scheduler_kwargs: {kind: 'off'}}", {"kind": "off"}),
        ("training: {run_name: '12', lr_scheduler_kwargs: {kind: off}}", {"kind": False}),
    ],
)
def test_text_stays_text_at_every_depth(load, added, found):
    training = load(added).training
    assert training["run_name"] == "12"
    assert training["lr_scheduler_kwargs"] == found


def test_numbers_of_the_command_line_are_numbers(load):
    config = load("training: {max_steps: 3}", "--training.learning_rate", "1e-4", "--training.max_steps=5")
    assert config.training == {"learning_rate": 1e-4, "max_steps": 5}


@pytest.mark.parametrize("text", ["Note: this", "Say: {x}", "[{x}]"])
def test_text_of_the_command_line_that_yaml_takes_for_a_mapping_or_a_list_stays_text(load, text):
    config = load("", "--data.system", text, "--data.prompt", "Say: {x}")
    assert (config.data.system, config.data.prompt) == (text, "Say: {x}")


def test_text_that_looks_like_something_else_stays_text_in_other_sections(load):
    config = load("adapter: {target_modules: '[qk]_proj'}\ncheckpoint: {resume: '12'}\n")
    assert config.adapter.target_modules == "[qk]_proj"
    assert config.checkpoint.resume == "12"
    lists = load("adapter: {target_modules: '[q_proj]'}\n")
    assert lists.adapter.target_modules == "[q_proj]"


@pytest.mark.parametrize("where", ["file", "command line"])
def test_text_of_a_source_stays_text(load, where):
    source = "{path: a.json, name: '7', fields: {prompt: 'no'}}"
    arguments = (f"data: {{train: {source}}}\n",) if where == "file" else ("", "--data.train", source)
    (found,) = load(*arguments).data.train_sources
    assert (found.name, found.fields) == ("7", {"prompt": "no"})


def test_the_command_line_wins_over_text_of_the_file(load):
    config = load("model: {path: 'no'}", "--model.path", "other", "--adapter.target_modules", "[v]")
    assert config.model.path == "other"
    assert config.adapter.target_modules == ["v"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("seed: '3'", "seed is the text '3', but must be a number: remove the quotation marks"),
        ("adapter: {train_gates: 'no'}", "train_gates is the text 'no', but must be true or false: remove the quot"),
        ("adapter: {initial_rank: '12'}", "initial_rank is the text '12', but must be a number"),
        ("pruning: {interval: '12'}", "pruning.interval is the text '12', but must be a number"),
        ("training: {max_steps: '12'}", "training.max_steps is '12', but must be a whole number"),
        ("checkpoint: {resume: no}", "checkpoint.resume is false, but must be text: put it in quotation marks"),
        ("checkpoint: {resume: 12}", "checkpoint.resume is 12, but must be text: put it in quotation marks$"),
        ("adapter: {new_tokens: <call>}", "adapter.new_tokens is <call>, but must be a list of texts or null"),
        ("adapter: {new_tokens: [1]}", r"adapter.new_tokens is \[1\], but must be a list of texts or null"),
        ("model: {path: m, rope_scaling: [yarn]}", r"model.rope_scaling is \['yarn'\], but must be a mapping or null"),
        ("data: {train: t, chat_template_kwargs: [a]}", r"chat_template_kwargs is \['a'\], but must be a mapping$"),
        (
            "data: {train: t, chat_template_kwargs: {1: a}}",
            "kwargs is 1, but must have names of variables",
        ),
    ],
)
def test_text_in_the_place_of_a_number_and_the_other_way_round_is_refused(load, added, message):
    with pytest.raises(ValueError, match=message):
        load(added)


def test_a_program_is_held_to_the_same():
    least = {"output_dir": "x", "model": {"path": "m"}, "data": {"train": "t"}}
    assert config_of({**least, "training": {"save_strategy": "no"}}).training == {"save_strategy": "no"}
    assert config_of({**least, "training": {"save_strategy": False}}).training == {"save_strategy": "no"}
    with pytest.raises(ValueError, match="seed is the text '3'"):
        config_of({**least, "seed": "3"})
