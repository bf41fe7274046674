import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.repository import REPOSITORY
from transformers import TrainingArguments

from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.data import DataConfig
from dora_dist.config.parse import config_text, load_config, parse_config
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import metrics_of
from dora_dist.config.training import (
    DEFAULT_TRAINING_ARGUMENTS,
    OWNED_TRAINING_ARGUMENTS,
    check_training_section,
    training_argument,
    whole_number,
)

LEAST = "output_dir: runs/x\nmodel:\n  path: some/model\ndata:\n  train: rows.jsonl\n"
SHIPPED = sorted(path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "compare")


@pytest.fixture
def load(tmp_path: Path):
    """``load(yaml, *overrides)``: the configuration of the least YAML with ``yaml`` added."""

    def load(added: str = "", *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(LEAST + added)
        return load_config(path, overrides)

    return load


PAPER = ("--preset", "paper")
MOVE = ("--pruning.rule", "move", "--adapter.slots", "16")
GROW = ("--pruning.rule", "grow")
FROM_DATA = ("--preset", "lora", "--adapter.ranks", "gradient_spectrum")
MODULES = ("--pruning.rule", "modules_per_layer")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_shipped_configuration_loads(path):
    config = load_config(path)
    assert config.output_dir
    assert config.adapter.start_rank >= config.adapter.target_rank


def test_the_quickstart_configuration_is_shipped():
    assert REPOSITORY / "configs" / "quickstart.yaml" in SHIPPED


def test_the_papers_preset_has_its_settings(load):
    config = load("preset: paper\n")
    assert (config.adapter.target_rank, config.adapter.start_rank, config.adapter.alpha) == (8, 12, 8)
    assert (config.adapter.dropout, config.adapter.init, config.adapter.dtype) == (0.1, "lora", "auto")
    pruning = config.pruning
    assert (pruning.warmup_fraction, pruning.final_fraction, pruning.interval) == (0.15, 0.5, "auto")
    assert (pruning.smoothing, pruning.equilibrium_weight, pruning.regrow) == (0.9, 0.1, True)
    assert config.model.quantization == "nf4"
    assert config.distributed.engine == "zero2"
    training = DEFAULT_TRAINING_ARGUMENTS
    assert (training["weight_decay"], training["max_grad_norm"], training["warmup_steps"]) == (0.01, 1.0, 0.06)
    check_training_section(training)


def test_the_command_line_wins_over_the_file(load):
    added = "adapter:\n  target_rank: 4\n  alpha: 2\ntraining:\n  learning_rate: 1e-4\n  max_steps: 5\n"
    config = load(
        added, "--adapter.target_rank", "16", "--training.max_steps=9", "--adapter.target_modules", "[q_proj]"
    )
    assert config.adapter.target_rank == 16
    assert config.adapter.alpha == 2
    assert config.training == {"learning_rate": 1e-4, "max_steps": 9}
    assert config.adapter.target_modules == ["q_proj"]


@pytest.mark.parametrize("option", [["--training.lr_scheduler_kwargs.a", "5"], ["--training.lr_scheduler_kwargs.a=5"]])
def test_one_entry_of_a_mapping_is_refused_where_it_would_take_the_place_of_all(load, option):
    with pytest.raises(ValueError, match=r"a is one entry of training\.lr_scheduler_kwargs: give all entries"):
        load("", *option)


def test_a_mapping_can_be_given_at_once(load):
    config = load("", "--training.lr_scheduler_kwargs", "{a: 5, b: 1.5}")
    assert config.training["lr_scheduler_kwargs"] == {"a": 5, "b": 1.5}


def test_a_command_line_alone_is_enough():
    config = parse_config(["--output_dir", "x", "--model.path", "m", "--data.train", "[a.json, b.json]"])
    assert config.data.train == ["a.json", "b.json"]


def test_a_saved_configuration_loads_as_an_equal_one(load, tmp_path):
    config = load(
        "seed: 7\nadapter:\n  initial_rank: 20\n  target_modules: [q_proj, v_proj]\npruning:\n  max_rank: 9\n"
        "training:\n  learning_rate: 1e-5\n  gradient_checkpointing_kwargs:\n    use_reentrant: false\n"
    )
    assert config.training["learning_rate"] == 1e-5
    (tmp_path / "saved.yaml").write_text(config_text(config))
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert again != load()


@pytest.mark.parametrize(
    ("yaml", "key", "nearest"),
    [
        ("adapter:\n  target_rnak: 4\n", "adapter.target_rnak", "adapter.target_rank"),
        ("pruning:\n  intervall: 4\n", "pruning.intervall", "pruning.interval"),
        ("sead: 4\n", "sead", "seed"),
        ("adaptor:\n  target_rank: 4\n", "adaptor.target_rank", "adapter.target_rank"),
        ("pruning:\n  target_rank: 4\n", "pruning.target_rank", "adapter.target_rank"),
        ("target_rank: 4\n", "target_rank", "adapter.target_rank"),
    ],
)
def test_an_unknown_or_misplaced_key_is_refused_with_the_nearest_valid_one(load, yaml, key, nearest):
    option = ["--" + key, "4"]
    for arguments in ((yaml,), ("", *option), ("", "=".join(option))):
        with pytest.raises(ValueError, match=f"^unknown key {key}; did you mean {nearest}\\?$"):
            load(*arguments)


def test_the_beginning_of_a_key_is_not_taken_for_the_key(load):
    with pytest.raises(ValueError, match=r"^unknown key adapter\.drop; did you mean adapter\.dropout\?$"):
        load("", "--adapter.drop", "0.3")


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("adapter.r", "; here it is adapter.target_rank"),
        ("lora_r", "; here it is adapter.target_rank"),
        ("lora_rank", "; here it is adapter.target_rank"),
        ("adapter.lora_alpha", "; here it is adapter.alpha"),
        ("cutoff_len", "; here it is data.max_length"),
        ("data.max_seq_length", "; here it is data.max_length"),
        ("model_name_or_path", "; here it is model.path"),
        ("learning_rate", "; here it is training.learning_rate"),
        ("num_train_epochs", "; here it is training.num_train_epochs"),
        ("lr", "; here it is training.learning_rate"),
        ("bf16", " (set model.compute_dtype)"),
        ("warmup_ratio", "; here it is training.warmup_steps"),
        ("model.dtype", "; here it is model.compute_dtype"),
    ],
)
def test_a_key_of_another_trainer_is_refused_with_its_name_here(load, key, here):
    section, _, name = key.rpartition(".")
    file = f"{section}: {{{name}: 4}}\n" if section and section not in LEAST else None
    for arguments in (("", f"--{key}", "4"), ("", f"--{key}=4"), *([(file,)] if file else [])):
        with pytest.raises(ValueError, match=f"^unknown key {key}{re.escape(here)}$"):
            load(*arguments)


@pytest.mark.parametrize(
    ("yaml", "key"),
    [
        ("adapter:\n", "adapter"),
        ("training:\n", "training"),
        ("seed:\n", "seed"),
        ("pruning:\n  interval:\n", "pruning.interval"),
        ("format_version: null\n", "format_version"),
    ],
)
def test_a_key_without_a_value_is_refused(load, yaml, key):
    with pytest.raises(ValueError, match=rf"run\.yaml: {key} is null, but must have a value: leave it out"):
        load(yaml)


def test_a_key_that_may_be_null_may_be_null(load):
    config = load("pruning:\n  max_rank: null\nadapter:\n  seed:\nevaluation:\n  max_examples: null\n")
    assert (config.pruning.max_rank, config.adapter.seed, config.evaluation.max_examples) == (None, None, None)


@pytest.mark.parametrize(("name", "nearest"), [("learning_rte", "learning_rate"), ("warmup_step", "warmup_steps")])
def test_an_unknown_training_argument_is_refused_with_the_nearest_valid_one(load, name, nearest):
    for arguments in ((f"training:\n  {name}: 1\n",), ("", f"--training.{name}", "1")):
        with pytest.raises(ValueError, match=f"training.{name} .* did you mean {nearest}"):
            load(*arguments)


@pytest.mark.parametrize(
    ("section", "key", "here"),
    [
        ("training: {lr_scheduler: cosine}\n", r"training\.lr_scheduler", r"training\.lr_scheduler_type"),
        ("training: {optimizer: sgd}\n", r"training\.optimizer", r"training\.optim"),
        ("data: {train: {path: t, type: alpaca}}\n", r"data\.train\[0\]\.type", r"data\.format"),
    ],
)
def test_a_name_of_another_trainer_is_known_within_a_section_and_a_source_too(tmp_path, section, key, here):
    path = tmp_path / "run.yaml"
    least = LEAST if "data" not in section else LEAST.partition("data:")[0]
    path.write_text(least + section)
    with pytest.raises(ValueError, match=rf"{key}.*; here it is {here}\b"):
        load_config(path)


@pytest.mark.parametrize("name", sorted(OWNED_TRAINING_ARGUMENTS))
def test_a_training_argument_that_the_program_sets_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"training.{name} is set by the program") as refusal:
        check_training_section({name: True})
    assert OWNED_TRAINING_ARGUMENTS[name] in str(refusal.value)


@pytest.mark.parametrize(
    ("optim", "reason"),
    [
        ("adamw_8bit", "blocks of 8 bits"),
        ("paged_adamw_8bit", "blocks of 8 bits"),
        ("adamw_torch_4bit", "blocks of 4 bits"),
        ("paged_adamw_32bit", "memory that only it can page"),
    ],
)
def test_an_optimizer_whose_state_zero_could_not_save_is_refused_before_anything_is_loaded(load, optim, reason):
    with pytest.raises(ValueError, match=f"training.optim is {optim}, which keeps its state in .*{reason}.* is zero2"):
        load("", "--training.optim", optim)
    assert load("", "--training.optim", optim, "--distributed.engine", "ddp").training["optim"] == optim


def test_owned_training_arguments_are_refused_when_loading(load):
    with pytest.raises(ValueError, match=r"training\.bf16 .* set model\.compute_dtype"):
        load("", "--training.bf16", "true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--adapter.target_rank", "0"], "target_rank is 0, but must be at least 1"),
        (["--adapter.target_rank", "four"], "adapter.target_rank.*four"),
        (["--adapter.initial_rank", "4"], "initial_rank is 4, below target_rank 8"),
        (["--adapter.dropout", "1.0"], "dropout is 1.0"),
        (["--adapter.alpha", "0"], "alpha is 0"),
        (["--adapter.init", "pissa"], "adapter.init.*pissa"),
        (["--adapter.dtype", "float16"], "adapter.dtype.*float16"),
        (["--adapter.init", "paper", "--adapter.train_gates", "false"], "init 'paper'.*train_gates"),
        (["--adapter.init", "adalora", "--adapter.train_gates", "false"], "init 'adalora'.*train_gates"),
        (["--adapter.init", "inputs", "--adapter.calibration_rows", "0"], "calibration_rows is 0.*at least 1"),
        (["--adapter.routing", "task"], "adapter.routing.*task"),
        (["--adapter.modules_per_prompt", "1"], "modules_per_prompt is 1, but must be at least 2: the router"),
        (["--adapter.balance_weight", "-1"], "balance_weight is -1.*, but must be 0 or a positive number"),
        (
            ["--adapter.routing", "prompt", "--adapter.initial_rank", "12"],
            "routing is prompt, which does not go with pruning, but initial_rank is 12 .* set initial_rank to 8",
        ),
        (
            ["--adapter.routing", "prompt", "--preset", "paper"],
            "adapter.routing is prompt, .* but pruning.rule is prune: set it to none",
        ),
        (
            ["--adapter.routing", "prompt"],
            r"routing is prompt and init is inputs, .* set init to lora or .*preset: lora does",
        ),
        (
            ["--adapter.routing", "prompt", "--preset", "lora", "--adapter.init", "gradient"],
            "routing is prompt and init is gradient, .* set init to lora or paper",
        ),
        (["--model.quantization", "fp4"], "model.quantization.*fp4"),
        *(
            (["--training.lr_scheduler_type", kind], f"training.lr_scheduler_type is {kind}, .* set it to linear")
            for kind in ("reduce_lr_on_plateau", "greedy")
        ),
        *(
            (["--training.optim", f"schedule_free_{kind}"], f"training.optim is schedule_free_{kind}, .* adamw_torch")
            for kind in ("radam", "adamw", "sgd")
        ),
        (["--pruning.smoothing", "1.0"], "pruning.smoothing is 1.0"),
        (["--pruning.warmup_fraction", "-0.1"], "pruning.warmup_fraction is -0.1"),
        (["--pruning.warmup_fraction", "0.1"], r"warmup_fraction \+ pruning.final_fraction is 0.1 \+ 0.9, but must"),
        (["--pruning.interval", "0"], "pruning.interval is 0"),
        (["--pruning.equilibrium_weight", "-1"], "pruning.equilibrium_weight is -1"),
        (["--pruning.min_rank", "-1"], "pruning.min_rank is -1"),
        (
            ["--pruning.max_rank", "9", "--pruning.regrow", "false"],
            "pruning.max_rank is 9 and regrow is false",
        ),
        (
            ["--pruning.importance", "gate_sensitivity", "--pruning.rebase", "true"],
            "pruning.rebase is true, but must be false for the importance gate_sensitivity",
        ),
        (
            ["--pruning.importance", "loss_change", "--pruning.rebase", "true"],
            "pruning.rebase is true, but must be false for the importance loss_change",
        ),
        (
            ["--pruning.importance", "gate_sensitivity", "--adapter.train_gates", "false"],
            "importance is gate_sensitivity, which needs gradients of the gates, but adapter.train_gates is false",
        ),
        (
            [*PAPER, "--pruning.max_rank", "9", "--adapter.train_gates", "false"],
            "pruning.max_rank is 9 and adapter.train_gates is false, so that no gate grows back",
        ),
        (["--pruning.rule", "move"], "pruning.rule is move, .* adapter.slots is null: set it to 16, say"),
        (["--adapter.slots", "16"], "adapter.slots is 16, but pruning.rule is prune, which fills none"),
        ([*MOVE, "--adapter.slots", "7"], "slots is 7, but must be at least 8, the rank at the start"),
        ([*MOVE, "--adapter.initial_rank", "9"], "initial_rank is 9, but pruning.rule is move, .*target_rank, 8"),
        (
            [*MOVE, "--pruning.rebase", "true", "--preset", "paper"],
            "pruning.rebase is true, but must be false for the rule move",
        ),
        ([*MOVE, "--pruning.max_rank", "9"], "pruning.max_rank is 9, but must be null for the rule move"),
        ([*MOVE, "--pruning.moved_per_event", "0"], "pruning.moved_per_event is 0"),
        ([*MOVE, "--training.optim", "adafactor"], "training.optim is adafactor, but pruning.rule is move"),
        ([*GROW, "--adapter.slots", "7"], "slots is 7, but must be at least 8, the rank at the start or, on average"),
        ([*GROW, "--adapter.initial_rank", "8"], "initial_rank is 8, but must be less than adapter.target_rank, 8"),
        ([*GROW, "--adapter.initial_rank", "4"], "initial_rank is 4, below .*with pruning.rule grow, set slots too"),
        (["--adapter.initial_rank", "0", "--adapter.slots", "9"], "initial_rank is 0, but must be at least 1"),
        ([*GROW, "--adapter.train_gates", "false"], "pruning.rule is grow, .* adapter.train_gates is false"),
        ([*GROW, "--adapter.ranks", "mlp-only"], "adapter.ranks is mlp-only, .* pruning.rule is grow"),
        ([*GROW, "--pruning.min_rank", "2"], "min_rank is 2, but pruning.rule is grow, .* its initial rank 1"),
        ([*GROW, "--pruning.max_rank", "9"], "pruning.max_rank is 9, but must be null for the rule grow"),
        ([*GROW, *PAPER, "--pruning.rebase", "true"], "pruning.rebase is true, but must be false for the rule grow"),
        ([*GROW, "--training.optim", "adafactor"], "training.optim is adafactor, but pruning.rule is grow"),
        ([*GROW, "--pruning.importance", "ablation"], "importance is ablation, but must be another for the rule grow"),
        (
            ["--adapter.ranks", "weight_gradient"],
            "adapter.ranks is weight_gradient, .* pruning.rule is prune: set it to",
        ),
        ([*FROM_DATA, "--adapter.slots", "7"], "slots is 7, but must be at least 8, the rank at the start"),
        ([*FROM_DATA, "--adapter.routing", "prompt"], "routing is prompt, but adapter.ranks is gradient_spectrum"),
        ([*MODULES, "--adapter.initial_rank", "9"], "initial_rank is 9, but pruning.rule is modules_per_layer, .*8"),
        (
            [*MODULES, *PAPER, "--pruning.rebase", "true"],
            "rebase is true, but must be false for the rule modules_per_layer",
        ),
        ([*MODULES, "--pruning.max_rank", "9"], "max_rank is 9, but must be null for the rule modules_per_layer"),
        ([*MODULES, "--pruning.min_rank", "1"], "min_rank is 1, but must be 0 for the rule modules_per_layer"),
        ([*MODULES, "--pruning.modules_per_layer", "0"], "pruning.modules_per_layer is 0"),
        ([*MODULES, "--adapter.slots", "16"], "slots is 16, but pruning.rule is modules_per_layer, which fills none"),
        (["--pruning.scoring_rows", "0"], "pruning.scoring_rows is 0"),
        (["--pruning.importance", "ablation"], "importance is ablation, but must be another for the rule prune"),
        ([*GROW, "--pruning.importance", "frobenius"], "is frobenius, which has no effect: pruning.rule is grow"),
        ([*GROW, *PAPER, "--pruning.smoothing", "0.5"], "smoothing is 0.5, which has no effect: pruning.rule is grow"),
        ([*MOVE, "--pruning.regrow", "false"], "regrow is false, which has no effect: pruning.rule is move"),
        ([*MOVE, "--pruning.equilibrium_weight", "0.2"], "equilibrium_weight is 0.2, which has no effect: .* move"),
        (["--pruning.moved_per_event", "4"], "moved_per_event is 4, which has no effect: pruning.rule is prune, not"),
        ([*MOVE, "--pruning.modules_per_layer", "2"], "modules_per_layer is 2, which has no effect: .* move, not"),
        (["--pruning.scoring_rows", "8"], "scoring_rows is 8, which has no effect: pruning.importance is gate_sens"),
        (
            ["--adapter.modules_per_prompt", "2"],
            "modules_per_prompt is 2, which has no effect: adapter.routing is none",
        ),
        (["--adapter.balance_weight", "0.1"], "balance_weight is 0.1, which has no effect: adapter.routing is none"),
        (["--pruning.min_rank", "9"], "target_rank 8 .* pruning.min_rank 9"),
        (["--pruning.max_rank", "4"], "target_rank 8 .* pruning.max_rank 4"),
        (["--data.max_length", "1"], "data.max_length is 1"),
        (["--data.overlong", "cut"], "data.overlong.*cut"),
        (["--evaluation.exact_match", "true"], "exact_match is true, but .* set data.eval"),
        (["--evaluation.metrics", "[final_number]"], "metrics has final_number, but .* set data.eval"),
        (["--evaluation.max_new_tokens", "0"], "evaluation.max_new_tokens is 0"),
        (["--evaluation.max_examples", "0"], "evaluation.max_examples is 0"),
        (["--distributed.engine", "zero3"], "distributed.engine.*zero3"),
        (["--distributed.shard_base", "yess"], "distributed.shard_base is yess, but must be true or false or node"),
        (
            ["--distributed.shard_base", "true"],
            "distributed.shard_base is true, but distributed.engine is zero2, .* set it to ddp",
        ),
        (
            ["--distributed.shard_base", "node", "--distributed.engine", "ddp", "--model.quantization", "int8"],
            "distributed.shard_base is node, but model.quantization is int8, .* set it to nf4 or none",
        ),
        (
            ["--distributed.shard_base", "true", "--distributed.engine", "ddp", "--adapter.new_tokens", "['<a>']"],
            r"shard_base is true, but adapter.new_tokens is \['<a>'\], with which no base can be sharded: leave it out",
        ),
        (["--adapter.new_tokens", "[]"], "new_tokens is an empty list, but must have one text or more: leave it out"),
        (["--adapter.new_tokens", "[' a']"], "new_tokens has ' a', but .* does not begin or end with white space"),
        (["--adapter.new_tokens", "[a, b, a]"], "new_tokens has 'a' 2 times: name it once"),
        (
            ["--adapter.new_tokens", "[a]", "--adapter.routing", "prompt", "--preset", "lora"],
            "new_tokens is set, but routing is prompt, .* leave one of them out",
        ),
        (["--distributed.timeout_minutes", "0"], "distributed.timeout_minutes is 0"),
        (["--distributed.join_minutes", "0"], "distributed.join_minutes is 0"),
        (["--distributed.silent_seconds", "1"], "distributed.silent_seconds is 1.*at least 5"),
        (["--distributed.max_skipped_steps", "-1"], "distributed.max_skipped_steps is -1"),
        (["--checkpoint.keep_last", "0"], "checkpoint.keep_last is 0"),
        (["--seed", "1.5"], "seed.*1.5"),
    ],
)
def test_an_impossible_value_is_refused_with_value_and_knob(load, overrides, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load("", *overrides)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("model.quantization", "foo", "be nf4, int8 or none"),
        ("model.recompute_layers", "1.5", "be auto, all, none, a whole number or null"),
        ("pruning.interval", "x", "be a whole number or auto"),
        ("adapter.target_rank", "1.5", "be a whole number"),
        ("adapter.alpha", "x", "be a number"),
        ("model.fuse", "x", "be true or false"),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_a_value_of_another_kind_is_refused_in_words(tmp_path, key, value, rule, in_file):
    path = tmp_path / "run.yaml"
    sections = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "o"}
    if in_file:
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{key} is {value}, but must {rule}')}$"):
        load_config(path, [] if in_file else [f"--{key}", value])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\nmodel:\n  path: m\n", "data.train"),
        ("output_dir: x\ndata:\n  train: t\n", "model.path"),
        ("output_dir: [x\n", r"run\.yaml, line 2: expected ',' or ']'"),
        ("output_dir: x\n model:\n", r"run\.yaml, line 2: mapping values are not allowed here: write it as YAML"),
        ("model: m\n", r"run\.yaml: model is 'm', but must be a section: indent its keys below it, such as path: "),
        ("model:\n  path: m\ndata: rows.jsonl\n", r"run\.yaml: data is 'rows\.jsonl', but must be a section"),
    ],
)
def test_an_incomplete_or_broken_file_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_section_is_no_option(load):
    with pytest.raises(ValueError, match=r"^--model is a section: set its keys as --model\.KEY"):
        load("", "--model", "llama")


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("target", "start"), [(1, 2), (2, 3), (3, 5), (8, 12), (16, 24)])
def test_the_initial_rank_is_one_and_a_half_times_the_target_rounded_up(target, start):
    assert DynamicLoraConfig(target_rank=target).start_rank == start


def test_help_lists_every_section_without_starting_anything():
    command = [sys.executable, "-m", "dora_dist.train", "--help"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for option in ("--config", "--adapter.target_rank", "--pruning.interval", "--data.train", "--model.path"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("learning_rate", "fast", "a number"),
        ("max_steps", "1e3 steps", "a whole number"),
        ("logging_first_step", "yes", "true or false"),
    ],
)
def test_training_arguments_of_a_wrong_type_are_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"training.{name} is '{value}', but must be {rule}"):
        check_training_section({name: value})


@pytest.mark.parametrize("value", [12.0, 12.5, True])
@pytest.mark.parametrize(
    "name",
    [
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "torch_empty_cache_steps",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
    ],
)
def test_training_arguments_that_are_no_whole_numbers_are_refused(name, value):
    check_training_section({name: 12})
    with pytest.raises(ValueError, match=f"training.{name} is {value}, but must be a whole number"):
        check_training_section({name: value})


def test_numbers_of_steps_that_may_be_fractions_or_none_are_taken():
    check_training_section({"logging_steps": 0.1, "save_steps": 12.0, "eval_steps": 0.5, "warmup_steps": 0.06})
    check_training_section({"torch_empty_cache_steps": None})


def test_a_training_argument_is_the_users_before_ours_before_the_librarys():
    assert training_argument({"weight_decay": 0.5}, "weight_decay") == 0.5
    assert training_argument({}, "weight_decay") == DEFAULT_TRAINING_ARGUMENTS["weight_decay"]
    assert training_argument({}, "gradient_accumulation_steps") == 1


def test_whole_numbers_are_the_users_or_the_librarys():
    assert whole_number({}, "max_steps") == -1
    assert whole_number({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps") == 4


@pytest.mark.parametrize(
    "name",
    [
        *("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1"),
        *("adam_epsilon", "logging_steps", "save_steps", "eval_steps", "eval_delay", "neftune_noise_alpha"),
        "lora_plus_ratio",
    ],
)
@pytest.mark.parametrize("value", [True, False, "0.5", "fast", [1]])
def test_training_arguments_that_are_no_numbers_are_refused(load, name, value):
    with pytest.raises(ValueError, match=rf"^training\.{name} is {re.escape(repr(value))}, but must be a number"):
        load(yaml.safe_dump({"training": {name: value}}))


def test_a_switch_is_no_number_on_the_command_line_either(load):
    with pytest.raises(ValueError, match=r"^training\.learning_rate is True, but must be a number$"):
        load("", "--training.learning_rate", "true")


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"adam_beta1": 2}, "adam_beta1 is 2, but must lie in [0, 1)"),
        ({"adam_beta2": -0.1}, "adam_beta2 is -0.1, but must lie in [0, 1)"),
        ({"adam_beta2": math.nan}, "adam_beta2 is nan, but must lie in [0, 1)"),
        ({"eval_steps": -1}, "eval_steps is -1, but must be a whole number of at least 1, or a share"),
        ({"save_steps": 0}, "save_steps is 0, but must be a whole number of at least 1, or a share"),
        ({"save_steps": 1.5}, "save_steps is 1.5, but must be a whole number of at least 1, or a share"),
        ({"logging_steps": math.inf}, "logging_steps is inf, but must be a whole number of at least 1, or a share"),
        ({"logging_steps": math.nan}, "logging_steps is nan, but must be a whole number of at least 1, or a share"),
        ({"eval_delay": -1}, "eval_delay is -1, but must be at least 0"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha is -1, but must be at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, but must be a whole number of at leas"),
        ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps is 0, but must be a whole number of at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1, but must be at least 0"),
        ({"dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor is 0, but must be a whole number of at least"),
        pytest.param(
            {"dataloader_multiprocessing_context": "frok"},
            "dataloader_multiprocessing_context is frok, but must be one",
            marks=pytest.mark.skipif(
                "dataloader_multiprocessing_context"
                not in {field.name for field in dataclasses.fields(TrainingArguments)},
                reason="this version of transformers has no such argument",
            ),
        ),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_persistent_workers is true, but training.dataloader_nu",
        ),
        ({"log_level": "loud"}, "log_level is loud, but must be one of detail, debug, info, warning, error, critical"),
        ({"optim": "adamw_torhc"}, "optim is adamw_torhc, but must be one of "),
        ({"optim": None}, "optim is None, but must be text"),
        ({"optim_args": "beta"}, "optim_args is beta, but must be NAME=VALUE"),
        ({"lr_scheduler_type": "lin"}, "lr_scheduler_type is lin, but must be one of linear, cosine"),
        ({"lr_scheduler_kwargs": "num_cycles"}, "lr_scheduler_kwargs is 'num_cycles', but must be a mapping or null"),
        ({"gradient_checkpointing_kwargs": [1]}, "gradient_checkpointing_kwargs is [1], but must be a mapping or null"),
        ({"save_strategy": "often"}, "save_strategy is often, but must be one of no, steps, epoch"),
        ({"report_to": 5}, "report_to is 5, but must be text, a list or null"),
        ({"run_name": 12}, "run_name is 12, but must be text or null: put it in quotation marks"),
        ({"ddp_static_graph": "yes"}, "ddp_static_graph is 'yes', but must be true or false or null"),
    ],
)
def test_training_arguments_that_end_in_a_librarys_error_later_are_refused_by_their_key(given, rule):
    with pytest.raises(ValueError, match=f"^training.{re.escape(rule)}"):
        check_training_section(given)


def test_training_arguments_of_every_kind_are_taken():
    check_training_section(
        {
            **{"learning_rate": 1, "num_train_epochs": 2, "adam_beta1": 0, "neftune_noise_alpha": 5, "max_steps": -1},
            **{"report_to": ["none"], "run_name": "12", "optim_args": "a=1, b=2", "logging_first_step": True},
            **{"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}, "log_level": "info"},
            **{"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "ddp_static_graph": None},
            **{"trackio_static_space_id": False, "debug": "underflow_overflow", "eval_steps": None},
        }
    )


def test_the_defaults_of_the_library_and_ours_meet_the_rules():
    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments) if entry.init}
    factories = {name for name, value in defaults.items() if value is dataclasses.MISSING}
    library = {name: value for name, value in defaults.items() if name not in OWNED_TRAINING_ARGUMENTS}
    check_training_section({name: value for name, value in library.items() if name not in factories})
    check_training_section(DEFAULT_TRAINING_ARGUMENTS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{path: a, wieght: 2}",
            r"^unknown key data\.train\[1\]\.wieght; did you mean weight\? \(a source has path, name",
        ),
        ("{name: a}", r"^data\.train\[1\] has no path"),
        ("{path: a, format: alpcaa}", r"^data\.train\[1\]: .*format.*alpcaa"),
        ("{path: a, max_rows: 0}", r"^data\.train\[1\]\.max_rows is 0, but must be at least 1"),
        ("{path: a, weight: -1}", r"^data\.train\[1\]\.weight is -1\.0, but must be positive"),
        ("{path: a, weight: 1}", r"1 of 2 sources in data\.train have a weight, but first\.jsonl has none"),
        ("{path: a, weight: 1, epochs: 2}", "data has weight and epochs, but they are different ways to mix sources"),
    ],
)
def test_a_source_that_cannot_be_is_refused_by_its_place(tmp_path, source, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: x\nmodel: {{path: m}}\ndata:\n  train:\n    - first.jsonl\n    - {source}\n")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config(path)


def test_two_sources_that_are_given_one_name_are_refused(load):
    with pytest.raises(ValueError, match=r"two sources of data\.train are called 'first'"):
        load("", "--data.train", "[{path: a, name: first}, {path: b, name: first}]")


@pytest.mark.parametrize("setting", [{"max_examples": 3}, {"weight": 5.0}, {"epochs": 2.0}])
def test_a_share_in_the_mixture_is_refused_for_held_out_data(setting):
    ((name, value),) = setting.items()
    message = rf"^data\.eval\[1\]\.{name} is {value}, which has no effect: it is for sources of data\.train\. Omit it"
    with pytest.raises(ValueError, match=message):
        DataConfig(train="a.jsonl", eval=["b.jsonl", {"path": "c.jsonl", **setting}])


def test_one_source_needs_no_list_and_is_saved_as_it_was_given(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nmodel: {path: m}\ndata:\n  train: {path: a.jsonl.gz, epochs: 2}\n")
    config = load_config(path)
    (source,) = config.data.train_sources
    assert (source.name, source.epochs) == ("a", 2.0)
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())["data"]
    assert saved["train"] == {"path": "a.jsonl.gz", "epochs": 2}
    assert saved["eval"] is None
    assert not [key for key in saved if "sources" in key], "they follow from train and eval"
    with pytest.raises(ValueError, match=r"unknown key data\.train_sources"):
        load_config(path, ["--data.train_sources", "[b.jsonl]"])


def test_other_sources_in_a_copy_of_a_section_are_parsed_anew(tmp_path):
    section = DataConfig(train={"path": "a.jsonl"})
    copy = dataclasses.replace(section, train=["b.jsonl"], max_length=9)
    assert [source.path for source in (*section.train_sources, *copy.train_sources)] == ["a.jsonl", "b.jsonl"]


def test_sources_of_the_same_file_name_are_told_apart(tmp_path):
    path = tmp_path / "run.yaml"
    for files, names in (
        (["a/x.jsonl", "b/x.jsonl.gz", "/data/c/x.csv"], ["a/x", "b/x", "c/x"]),
        (["a/x.jsonl", "b/y.jsonl"], ["x", "y"]),
        (["p/en/train/x.jsonl", "p/de/train/x.jsonl"], ["en/train/x", "de/train/x"]),
        (["x.jsonl", "x.jsonl", "./x.jsonl"], ["x", "x-2", "x-3"]),
        (["a/*.jsonl", "b/*.jsonl"], ["a/data", "b/data"]),
        (["one/set", "two/set"], ["one/set", "two/set"]),
        ([{"path": "a/x.jsonl", "name": "b/x"}, "b/x.jsonl", "c/x.jsonl"], ["b/x", "x", "c/x"]),
    ):
        sources = {"output_dir": "x", "model": {"path": "m"}, "data": {"train": files}}
        path.write_text(yaml.safe_dump(sources))
        assert [source.name for source in load_config(path).data.train_sources] == names


CLASSIFICATION = "task: sequence_classification\n"


@pytest.mark.parametrize(
    ("yaml", "options", "message"),
    [
        ("task: classification\n", (), "task"),
        (
            "",
            ("--data.format", "classification"),
            "classification is for the task sequence_classification, but task is",
        ),
        (CLASSIFICATION, ("--data.format", "text"), "text is for the task causal_lm, but task is sequence_class"),
        ("", ("--data.labels", "regression"), "data.labels is regression, but task is causal_lm"),
        (CLASSIFICATION, ("--data.batching", "packed"), "data.batching is packed, which is for the task causal_lm"),
        (CLASSIFICATION, ("--data.prompt", "Say: {x}"), "data.prompt is 'Say: {x}', which is for the task causal_lm"),
        (CLASSIFICATION, ("--data.system", "Hi"), "data.system is 'Hi', which is for the task causal_lm, but task is"),
        (CLASSIFICATION, ("--data.as_chat", "false"), "data.as_chat is false, which is for the task causal_lm"),
        (
            CLASSIFICATION,
            ("--data.eval", "[a.jsonl, {path: b.jsonl, prompt: 'Say: {x}'}]"),
            r"data.eval\[1\].prompt is 'Say: {x}', which is for the task causal_lm, but task is sequence_class",
        ),
        (CLASSIFICATION, ("--data.train_on", "last"), "data.train_on is last, which is for the task causal_lm"),
        (
            CLASSIFICATION,
            ("--data.eval", "x", "--evaluation.exact_match", "true"),
            "evaluation.exact_match is true, which",
        ),
        (
            CLASSIFICATION,
            ("--evaluation.metrics", "[accurcy]"),
            "'accurcy', but .* has accuracy, .*did you mean accuracy",
        ),
        (CLASSIFICATION, ("--evaluation.metrics", "[f1, f1]"), "'f1' twice"),
        (
            CLASSIFICATION,
            ("--evaluation.metrics", "[matthews]", "--data.labels", "regression"),
            "'matthews', but task sequence_classification with data.labels regression has pearson, spearman",
        ),
        ("", ("--evaluation.metrics", "[accuracy]"), "'accuracy', but task causal_lm has final_number"),
        (CLASSIFICATION, ("--evaluation.metrics", "[final_number]"), "'final_number', but task sequence_class"),
        (
            CLASSIFICATION,
            ("--adapter.routing", "prompt", "--preset", "lora"),
            "adapter.routing is prompt, which is for the task causal_lm, but task is sequence_classification",
        ),
        (CLASSIFICATION, ("--adapter.new_tokens", "[a]"), "new_tokens is .*, which is for the task causal_lm, but"),
    ],
)
def test_what_a_task_cannot_have_is_refused(load, yaml, options, message):
    with pytest.raises(ValueError, match=message):
        load(yaml, *options)


def test_routing_runs_layer_by_layer(load, tmp_path):
    config = load("", "--adapter.routing", "prompt", "--preset", "lora")
    assert not config.model.fuse
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert load("").model.fuse


def test_ranks_from_data_fill_slots_and_are_counted_in_parameters(load, tmp_path):
    config = load("", *FROM_DATA)
    assert (config.adapter.slots, config.adapter.start_rank, config.pruning.budget_unit) == (16, 8, "parameters")
    assert load("", *FROM_DATA, "--adapter.slots", "32").adapter.num_slots == 32
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_metrics_are_those_of_the_task_unless_chosen():
    assert metrics_of("sequence_classification", "classes", None) == ("accuracy", "matthews")
    assert metrics_of("sequence_classification", "regression", None) == ("pearson", "spearman")
    assert metrics_of("sequence_classification", "classes", ["f1"]) == ("f1",)
    assert metrics_of("causal_lm", "classes", None) == ()


def test_generated_answers_can_be_judged_in_two_ways(load):
    both = ["--data.eval", "x", "--evaluation.exact_match", "true", "--evaluation.metrics", "[final_number]"]
    assert load("", *both).measured == ("exact_match", "final_number")
    assert load("").measured == ()


@pytest.mark.parametrize("value", ["auto", "all", "none", 0, 12])
def test_layers_to_recompute_are_a_word_or_a_number(load, tmp_path, value):
    assert load("", "--model.recompute_layers", str(value)).model.recompute_layers == value
    path = tmp_path / "own.yaml"
    path.write_text(LEAST.replace("  path: some/model\n", f"  path: some/model\n  recompute_layers: {value}\n"))
    assert load_config(path).model.recompute_layers == value
    assert load().model.recompute_layers is None


@pytest.mark.parametrize("value", ["-1", "some", "1.5", "true"])
def test_other_layers_to_recompute_are_refused(load, value):
    with pytest.raises(ValueError, match=r"model\.recompute_layers"):
        load("", "--model.recompute_layers", value)


@pytest.mark.parametrize("entry", ["gradient_checkpointing: true", "gradient_checkpointing: false"])
def test_both_ways_to_recompute_are_refused_by_both_names(load, entry):
    name, _, value = entry.partition(": ")
    with pytest.raises(
        ValueError,
        match=rf"training\.{name} is {value} and model\.recompute_layers is auto, .*leave training\.{name} out",
    ):
        load(f"training:\n  {entry}\n", "--model.recompute_layers", "auto")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("{use_reentrant: true}", "has use_reentrant: True, which is not supported: the reentrant kind"),
        ("{preserve_rng_state: false}", "has preserve_rng_state: False, which is not supported: dropout"),
        ("{every_n_layers: 2}", r"has every_n_layers: 2, .*set model\.recompute_layers"),
    ],
)
def test_ways_of_recomputing_that_give_other_numbers_are_refused(load, options, reason):
    with pytest.raises(ValueError, match=rf"training\.gradient_checkpointing_kwargs {reason}"):
        load(f"training:\n  gradient_checkpointing: true\n  gradient_checkpointing_kwargs: {options}\n")


def test_a_switch_for_recomputing_that_is_none_is_refused(load):
    with pytest.raises(ValueError, match=r"training\.gradient_checkpointing is 'maybe', but must be true or false"):
        load("", "--training.gradient_checkpointing", "maybe")
