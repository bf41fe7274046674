"""From a configuration to the parts of a run: what is refused before a model is read, and what a run is known by."""

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from support.architectures import save_model
from support.resolved_run import load, resolved
from support.tiny_encoders import pair_tokenizer, save_tiny_encoder, write_classification, write_summaries
from support.tiny_models import VOCABULARY, tiny_model
from support.tiny_run import tiny_tokenizer, write_rows
from support.tiny_tokenizer import word_tokenizer
from transformers import AutoModel

from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.config import data as data_config
from dora_dist.config.tasks import SEQUENCE_CLASSIFICATION as CLASSIFICATION
from dora_dist.config.training import DEFAULT_TRAINING_ARGUMENTS, OWNED_TRAINING_ARGUMENTS
from dora_dist.data import mixture, plan
from dora_dist.memory.estimate import estimate_memory
from dora_dist.memory.table import render
from dora_dist.setup import build, resolve, run_data, training_arguments
from dora_dist.setup.describe import describe

ROUTED = (
    "--adapter.routing",
    "prompt",
    "--preset",
    "lora",
    "--adapter.target_rank",
    "2",
    "--adapter.initial_rank",
    "2",
)


def mixture_of(num_examples):
    return mixture.Mixture(
        members=[np.arange(num_examples)],
        counts=[num_examples],
        lengths=np.full(num_examples, 8),
        batching="padded",
        max_length=64,
        seed=0,
    )


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
        ([*ROUTED, "--adapter.modules_per_prompt", "8"], "the decoder blocks have 7 adapted modules"),
        (["--training.max_steps", "1"], "1 optimizer steps with warmup_fraction 0.15"),
        (["--distributed.engine", "zero2", "--adapter.dtype", "bfloat16"], "adapter.dtype is bfloat16, but DeepSpeed"),
        *(
            (
                ["--distributed.engine", engine, "--adapter.dtype", "bfloat16"],
                f"adapter.dtype is bfloat16, but .*engine {engine} keeps no float32 master copy.*set .* to auto",
            )
            for engine in ("ddp", "none")
        ),
    ],
)
def test_a_method_that_cannot_work_is_refused_without_reading_weights(config, overrides, message):
    settings = load(config, *overrides)
    (config.parent / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        resolve.check_method(
            settings, load_skeleton(BaseModelSpec(path=settings.model.path)), settings.training["max_steps"]
        )


def test_what_a_run_would_report_to_changes_no_variable_of_the_environment(config):
    before = dict(os.environ)
    training_arguments.training_arguments(load(config, "--training.report_to", "tensorboard"), mixture_of(50))
    assert dict(os.environ) == before


@pytest.fixture
def experts(config):
    """The configuration of a model with fused experts, without its weights."""
    save_model("mixtral", config.parent / "model")
    (config.parent / "model" / "model.safetensors").unlink()
    return config


def test_a_model_whose_experts_stay_in_16_bits_is_refused_in_the_dry_run_and_the_estimate(experts):
    for decide in (resolved, partial(estimate_memory, world_size=1)):
        with pytest.raises(ValueError, match=r"nf4, but 88\.9% of the block weights.*model\.allow_unquantized"):
            decide(load(experts))


@pytest.mark.parametrize("overrides", [["--model.allow_unquantized", "true"], ["--model.quantization", "none"]])
def test_what_all_linear_leaves_out_is_said_in_the_dry_run_and_the_estimate(experts, overrides):
    settings = load(experts, *overrides)
    run, estimate = resolved(settings), estimate_memory(settings, 1)
    assert run.unadapted.startswith(
        "all-linear leaves out 88.9% of the block weights: model.layers.*.mlp.experts.gate_up"
    )
    for text in (describe(settings, run, 1), render(estimate)):
        assert run.unadapted in text
    named = load(experts, *overrides, "--adapter.target_modules", "[q_proj]")
    assert resolved(named).unadapted is None


def with_tokens(config, **changes):
    """Give the tokenizer two tokens for which the embedding has no row, and a special one perhaps."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["beyond", "farther"])
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(config.parent / "model")


@pytest.mark.parametrize(("key", "kind"), [("train", "training"), ("eval", "held-out")])
def test_a_token_in_the_data_for_which_the_embedding_has_no_row_is_refused(config, key, kind):
    with_tokens(config)
    path = write_rows(config.parent / "other.jsonl", 5, seed=1)
    path.write_text(path.read_text().replace("w1 w2", "w1 farther"))
    words = rf"input_ids of the {kind} data of other is 'farther' with the number 97, .* has 96 rows"
    with pytest.raises(ValueError, match=words):
        resolved(load(config, f"--data.{key}", str(path)))


def test_such_a_token_in_the_rows_that_are_trained_is_refused_where_others_of_their_source_are_held_out(config):
    with_tokens(config)
    path = write_rows(config.parent / "other.jsonl", 40, seed=1)
    path.write_text(path.read_text().replace("w1 w2", "w1 farther", 1))
    with pytest.raises(ValueError, match=r"the training data of other is 'farther'"):
        resolved(load(config, "--data.train", str(path), "--data.eval", "5%"))


@pytest.mark.parametrize(("field", "column"), [("document", "input_ids"), ("summary", "labels")])
def test_such_a_token_in_a_document_or_its_summary_is_refused(tmp_path, field, column):
    config = write_summaries(tmp_path)
    tokenizer = pair_tokenizer(eos_token="</s>")
    tokenizer.add_tokens(["farther"])
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "train.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | {field: "w0 farther"}) + "\n" + "".join(others))
    with pytest.raises(ValueError, match=f"a token in {column} of the training data of train is 'farther'"):
        resolved(load(config))


def test_a_padding_token_for_which_the_embedding_has_no_row_is_refused(config):
    with_tokens(config, pad_token="beyond")
    with pytest.raises(
        ValueError, match=r"the padding token is 'beyond' with the number 96, .* has 96 rows \(0 to 95\)"
    ):
        resolved(load(config))


def test_tokens_without_a_row_that_nothing_uses_are_remarked(config):
    assert not any("embedding" in remark for remark in resolved(load(config)).data.remarks())
    with_tokens(config)
    (remark,) = (remark for remark in resolved(load(config)).data.remarks() if "embedding" in remark)
    assert "2 tokens such as 'beyond' (96)" in remark


@pytest.mark.parametrize(
    ("importance", "steps", "interval", "events"),
    [
        ("frobenius", 12, 1, 6),
        ("frobenius", 100, 1, 36),
        ("frobenius", 1000, 17, 22),
        ("frobenius", 20000, 350, 21),
        ("gate_sensitivity", 12, 1, 6),
        ("gate_sensitivity", 100, 3, 13),
        ("gate_sensitivity", 1000, 25, 15),
        ("gate_sensitivity", 20000, 350, 21),
    ],
)
def test_an_automatic_interval_depends_on_the_length_and_the_importance(config, importance, steps, interval, events):
    judged = ("--pruning.importance", importance)
    run = resolved(load(config, "--pruning.interval", "auto", "--training.max_steps", str(steps), *judged))
    assert run.budget.schedule.interval == interval
    assert len(run.budget.schedule.prune_steps) == events
    assert run.fingerprint.pruning["interval"] == interval, "the number, not its name"
    assert not [remark for remark in run.remarks() if "pruning.interval" in remark]
    assert (
        run.fingerprint
        == resolved(
            load(config, "--pruning.interval", str(interval), "--training.max_steps", str(steps), *judged)
        ).fingerprint
    )


@pytest.mark.parametrize(
    ("overrides", "remark"),
    [
        (
            ["--pruning.interval", "100", "--training.max_steps", "200"],
            "interval 100 gives 2 .*to auto, which is 3 here",
        ),
        (["--pruning.interval", "1", "--training.max_steps", "5"], "interval 1 gives 2 .* at once: train longer"),
        (["--pruning.interval", "100", "--training.max_steps", "200", "--adapter.initial_rank", "2"], None),
    ],
)
def test_few_events_are_warned_about_where_something_is_pruned(config, overrides, remark):
    found = [text for text in resolved(load(config, *overrides)).remarks() if "pruning events" in text]
    assert len(found) == (remark is not None)
    assert remark is None or re.search(remark, found[0])


def test_a_rank_that_a_layer_cannot_have_is_refused_with_its_name_and_the_largest(config):
    shapes = r"adapter\.initial_rank is 100, but must be at most (\d+), the largest rank that the layer (\S+) can have"
    with pytest.raises(ValueError, match=shapes) as refusal:
        resolved(load(config, "--adapter.initial_rank", "100"))
    most, layer = re.search(shapes, str(refusal.value)).groups()
    linear = load_skeleton(BaseModelSpec(path=str(config.parent / "model"))).get_submodule(layer)
    assert min(linear.in_features, linear.out_features) == int(most)
    assert resolved(load(config, "--adapter.initial_rank", most)).budget.schedule.initial_rank == int(most)
    with pytest.raises(ValueError, match=r"initial_rank \(1\.5 x adapter\.target_rank by default\) is 150, but"):
        resolved(load(config, "--adapter.target_rank", "100", "--adapter.initial_rank", "null"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["--training.lr_scheduler_type", "constant"],
        ["--training.lr_scheduler_type", "constant", "--training.warmup_steps", "0"],
        ["--training.lr_scheduler_type", "constant_with_warmup", "--training.warmup_steps", "100"],
        ["--training.adam_beta2", "0.95", "--training.adam_epsilon", "1e-6"],
        ["--training.optim", "adamw_bnb_8bit", "--training.adam_beta1", "0.8"],
        ["--training.optim", "lion_32bit", "--training.adam_beta2", "0.95"],
        ["--training.optim", "sgd", "--training.optim_args", "momentum=0.9, nesterov=true"],
        ["--training.optim", "ademamix", "--training.optim_args", "alpha=5.0,beta3=0.9999,t_alpha=100"],
    ],
)
def test_settings_that_the_optimizer_and_the_schedule_read_are_taken(config, overrides):
    training_arguments.training_arguments(load(config, *overrides), mixture_of(50))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.save_strategy", "epoch"], "save_strategy is epoch, .*save_steps"),
        (["--training.lr_scheduler_kwargs", "{cycles: 2}"], "is linear, .*lr_scheduler_kwargs {'cycles': 2}: .*cycles"),
        (["--training.per_device_train_batch_size", "51"], "50 training examples do not fill one global batch of 51"),
        (["--model.compute_dtype", "bfloat16"], "there is no GPU"),
        (
            ["--training.lr_scheduler_type", "cosine", "--training.lr_scheduler_kwargs", "{num_cycle: 2}"],
            "lr_scheduler_type is cosine, .*lr_scheduler_kwargs {'num_cycle': 2}: .*unexpected keyword .*num_cycle",
        ),
        (["--training.lr_scheduler_type", "warmup_stable_decay"], "is warmup_stable_decay, .*num_decay_steps"),
        (["--training.lr_scheduler_type", "cosine_with_min_lr"], "is cosine_with_min_lr, .*min_lr"),
        (["--training.optim", "stable_adamw"], "optim is stable_adamw, which cannot be used here: .*torch-optimi"),
        (
            ["--training.lr_scheduler_type", "constant", "--training.warmup_steps", "100"],
            "warmup_steps is 100, which has no effect: .*is constant, .*Set it to constant_with_warmup",
        ),
        (
            ["--training.lr_scheduler_type", "constant_with_warmup", "--training.lr_scheduler_kwargs", "{cycles: 2}"],
            "lr_scheduler_kwargs is {'cycles': 2}, which has no effect: .*is constant_with_warmup",
        ),
        (
            ["--training.optim", "adafactor", "--training.adam_beta2", "0.95"],
            "adam_beta2 is 0.95, .* is adafactor",
        ),
        (["--training.optim", "sgd", "--training.adam_epsilon", "1e-6"], "adam_epsilon is 1e-06, .*optim is sgd"),
        (["--training.optim", "lion_32bit", "--training.adam_epsilon", "1e-6"], "adam_epsilon is 1e-06, .*lion"),
        (["--training.optim_args", "momentum=0.9"], "optim_args has momentum=0.9, which has no effect: .*adamw_torch"),
        (
            ["--training.optim", "sgd", "--training.optim_args", "momentum=0.9,eps=1e-6"],
            "optim_args has eps=1e-6, which has no effect: training.optim is sgd",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those of a machine without a GPU")
def test_training_settings_that_cannot_work_are_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        training_arguments.training_arguments(load(config, *overrides), mixture_of(50))


def test_evaluation_during_training_needs_held_out_data(config):
    with pytest.raises(ValueError, match=r"eval_strategy is steps, but data\.eval is not set"):
        training_arguments.training_arguments(
            load(config, "--training.eval_strategy", "steps", "--data.eval", "null"), mixture_of(50)
        )


@pytest.mark.parametrize(("name", "value"), [("eval_steps", "10"), ("eval_steps", "0.1"), ("eval_delay", "4")])
@pytest.mark.parametrize(("data", "advice"), [((), "or set"), (("--data.eval", "null"), "or set data.eval, and set")])
def test_times_of_evaluations_that_are_never_made_are_refused(config, name, value, data, advice):
    with pytest.raises(
        ValueError,
        match=rf"^training\.{name} is {value}, which has no effect: training\.eval_strategy is no\. "
        rf"Omit training\.{name}, {advice} training\.eval_strategy to steps$",
    ):
        training_arguments.training_arguments(load(config, f"--training.{name}", value, *data), mixture_of(50))


def test_one_line_turns_evaluations_saves_and_logged_steps_off(config):
    options = ["--training.eval_steps", "2", "--training.save_steps", "2", "--training.logging_steps", "2"]
    for strategy in ("eval_strategy", "save_strategy", "logging_strategy"):
        options += [f"--training.{strategy}", "no"]
    arguments = training_arguments.training_arguments(load(config, *options), mixture_of(50))
    assert (arguments.eval_strategy, arguments.save_strategy, arguments.logging_strategy) == ("no", "no", "no")


def test_what_the_program_sets_is_refused_in_the_configuration(config, monkeypatch):
    """Otherwise a user who sets it gets an error about a keyword given twice."""
    seen = {}
    monkeypatch.setattr(training_arguments, "TrainingArguments", seen.update)
    with pytest.raises(AttributeError):
        training_arguments.training_arguments(load(config), mixture_of(50))
    given = {*DEFAULT_TRAINING_ARGUMENTS, *load(config).training, "dataloader_pin_memory"}
    assert set(seen) - given <= set(OWNED_TRAINING_ARGUMENTS)


def test_a_resumed_run_may_turn_fused_operations_on_or_off(config):
    fingerprints = [resolved(load(config, "--model.fuse", fuse)).fingerprint for fuse in ("true", "false")]
    assert fingerprints[0] == fingerprints[1]


def test_the_fingerprint_knows_the_content_of_the_data(config):
    before = resolved(load(config)).fingerprint
    rows = (config.parent / "train.jsonl").read_text().splitlines()
    changed = json.loads(rows[7])
    changed["output"] += " w3"
    rows[7] = json.dumps(changed)
    (config.parent / "train.jsonl").write_text("\n".join(rows))
    after = resolved(load(config)).fingerprint
    (difference,) = before.differences(after)  # the order is one of numbers, and stays
    assert difference.startswith("examples of train was ")


def test_the_fingerprint_knows_the_weights_of_the_base_wherever_they_lie(config, tmp_path):
    model = config.parent / "model"
    before = resolved(load(config)).fingerprint
    shutil.copytree(model, tmp_path / "copy")
    assert resolved(load(config, "--model.path", str(tmp_path / "copy"))).fingerprint.weights == before.weights
    tiny_model(seed=1).save_pretrained(model)
    (difference,) = before.differences(resolved(load(config)).fingerprint)
    assert difference.startswith("weights of model.path was '1 files, ")


@pytest.mark.parametrize(("name", "value"), [("neftune_noise_alpha", "5.0"), ("optim_args", "momentum=0.9")])
def test_the_fingerprint_knows_what_changes_the_steps_beside_the_optimizer(config, name, value):
    optimizer = ["--training.optim", "sgd"]
    before = resolved(load(config, *optimizer)).fingerprint
    (difference,) = before.differences(resolved(load(config, *optimizer, f"--training.{name}", value)).fingerprint)
    assert difference.startswith(f"training.{name} was None and is now ")
    of_an_earlier_version = {key: setting for key, setting in before.training.items() if key != name}
    assert not dataclasses.replace(before, training=of_an_earlier_version).differences(before)


def test_dropped_examples_are_counted_and_said(config):
    data = resolved(load(config, "--data.max_length", "16", "--data.overlong", "drop")).data
    (source,) = data.train
    assert 0 < source.counts.overlong < 50
    assert source.counts.overlong + source.counts.examples == 50
    assert data.remarks()[:2] == [
        f"train: dropped {source.counts.overlong} examples that do not fit into data.max_length",
        f"train: skipped rows are listed in {source.folder}/left_out.jsonl",
    ]


def test_the_same_data_twice_is_said(config):
    rows = (config.parent / "train.jsonl").read_text()
    (config.parent / "again.jsonl").write_text(rows)
    sources = json.dumps([str(config.parent / "train.jsonl"), str(config.parent / "again.jsonl")])
    (note,) = resolved(load(config, "--data.train", sources)).data.notes
    assert note.startswith("warning: train and again hold the same examples")


def test_a_chat_template_that_is_not_there_is_refused_also_where_no_row_needs_it(config):
    with pytest.raises(ValueError, match=r"data\.chat_template is 'chatmll', but must be auto, one of"):
        resolved(load(config, "--data.chat_template", "chatmll"))


def test_the_order_is_part_of_what_a_run_is_known_by(config):
    before = resolved(load(config)).fingerprint
    for overrides in (["--data.batching", "packed", "--data.max_length", "64"], ["--data.batching", "by_length"]):
        after = resolved(load(config, *overrides)).fingerprint
        assert [text.partition(" was ")[0] for text in before.differences(after)] == ["data order", "data.batching"]


def test_epochs_are_counted_in_rows(config):
    one = ["--training.max_steps", "-1", "--training.num_train_epochs", "6"]
    assert resolved(load(config, *one)).arguments.max_steps == 75
    packed = resolved(load(config, *one, "--data.batching", "packed", "--data.max_length", "64"))
    assert packed.arguments.max_steps < 40
    assert packed.plan.num_rows == packed.arguments.max_steps * 4
    assert packed.plan.row_lengths(packed.mixture.lengths).max() <= 64
    assert training_arguments.count_steps(resolved(load(config, *one)).mixture, -1, 6, global_batch=20) == 15


@pytest.mark.parametrize(
    ("key", "length"), [("max_steps", "12"), *(("num_train_epochs", epochs) for epochs in ("1", "3", "2.3"))]
)
def test_every_window_of_packed_examples_is_packed_once(config, monkeypatch, key, length):
    packed, pack = Counter(), plan.PackedOrder._pack

    def counted(self, number, examples):
        packed[number, len(examples)] += 1
        return pack(self, number, examples)

    monkeypatch.setattr(plan.PackedOrder, "_pack", counted)
    monkeypatch.setattr(plan, "PACKING_WINDOW", 16)
    packing = ["--data.batching", "packed", "--data.max_length", "64", "--training.max_steps", "-1"]
    found = resolved(load(config, *packing, f"--training.{key}", length))
    assert found.padding_share() < 0.5
    assert found.describe_data()["train"][0]["per_epoch"] == 50
    full = [number for number, size in packed if size >= 12]
    assert sorted(full) == list(range(len(full)))
    assert len(full) >= 3
    assert set(packed.values()) == {1}


def test_the_sources_are_parsed_once(config, monkeypatch):
    parsed, parse = [], data_config._source

    def counted(entry, where):
        parsed.append(where)
        return parse(entry, where)

    monkeypatch.setattr(data_config, "_source", counted)
    rows = [{"path": str(config.parent / "train.jsonl")}, str(write_rows(config.parent / "more.jsonl", 10, seed=5))]
    found = resolved(load(config, "--data.train", json.dumps(rows)))
    assert [source.name for source in found.data.train] == ["train", "more"]
    assert sorted(parsed) == ["data.eval[0]", "data.train[0]", "data.train[1]"]


def test_weights_and_repetitions_of_sources_reach_the_plan(config):
    rows = config.parent / "train.jsonl"
    more = write_rows(config.parent / "more.jsonl", 10, seed=5)
    sources = [{"path": str(rows), "epochs": 0.2}, {"path": str(more), "epochs": 3}]
    plan = resolved(load(config, "--data.train", json.dumps(sources))).plan
    assert (plan.examples[:40] >= 50).sum() == 30
    capped = [{"path": str(rows), "max_examples": 7}, str(more)]
    mixture = resolved(load(config, "--data.train", json.dumps(capped))).mixture
    assert mixture.counts == [7, 10]


def test_the_fingerprint_knows_what_control_tokens_are_in_texts(config):
    before = resolved(load(config)).fingerprint
    after = resolved(load(config, "--data.control_tokens", "text")).fingerprint
    differences = before.differences(after)
    assert [text.split(" was ")[0] for text in differences] == ["data.eval: examples of eval", "examples of train"]
    assert all(text.endswith(", control tokens as text'") for text in differences)


def test_exact_match_without_anything_to_ask_is_refused(config):
    rows = [{"prompt": prompt, "completion": "w3"} for prompt in ("w1", "", "w2", "")]
    (config.parent / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--data.as_chat", "false", "--evaluation.exact_match", "true"]
    with pytest.raises(
        ValueError, match=r"2 of 4 examples of eval have an empty prompt \(first .*eval\.jsonl, line 2\)"
    ):
        resolved(load(config, *asked))
    resolved(load(config, *asked, "--evaluation.max_examples", "1"))
    resolved(load(config, "--data.as_chat", "false"))


def test_references_that_no_answer_is_long_enough_to_equal_are_told_and_all_of_them_refused(config):
    rows = [{"prompt": "w1", "completion": " ".join(["w2"] * words)} for words in (3, 6, 9, 2)]
    (config.parent / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def remarks(*options):
        return resolved(load(config, "--data.as_chat", "false", *options)).remarks()

    asked = ("--evaluation.exact_match", "true", "--evaluation.max_new_tokens")
    (told,) = (remark for remark in remarks(*asked, "5") if "max_new_tokens" in remark)
    assert told.startswith("warning: 2 of 4 references of eval are longer than evaluation.max_new_tokens 5")
    assert told.endswith("set it to 9, which holds all of them")
    with pytest.raises(ValueError, match=r"max_new_tokens is 1, but all 4 .*the shortest has 2 tokens.* set it to 9"):
        remarks(*asked, "1")
    with pytest.raises(ValueError, match=r"max_new_tokens is 2, but all 2 references .* set it to 6"):
        remarks(*asked, "2", "--evaluation.max_examples", "2")
    for enough in (
        (*asked, "9"),
        (*asked, "3", "--evaluation.max_examples", "1"),
        ("--evaluation.max_new_tokens", "1"),
    ):
        assert not any("max_new_tokens" in remark for remark in remarks(*enough))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--evaluation.exact_match", "true"], "evaluation.exact_match is true"),
        (["--evaluation.metrics", "[final_number]"], "evaluation.metrics has final_number"),
    ],
)
def test_generated_answers_on_plain_text_are_refused(config, asked, why):
    (config.parent / "eval.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    with pytest.raises(ValueError, match=rf"{why}, but eval is plain text, which has no answers"):
        resolved(load(config, *asked))


def test_references_without_a_number_are_refused_where_the_last_one_is_compared(config):
    word_tokenizer("w1 w2 w3 18 7").save_pretrained(config.parent / "model")
    rows = [{"prompt": "w1", "completion": answer} for answer in ("w2 18", "w3", "7 w2", "w2 w3")]
    (config.parent / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--data.as_chat", "false", "--evaluation.metrics", "[final_number]"]
    with pytest.raises(
        ValueError, match=r"2 of 4 examples of eval have an answer without a number \(first .*eval\.jsonl, line 2\)"
    ):
        resolved(load(config, *asked))
    resolved(load(config, *asked, "--evaluation.max_examples", "1"))
    resolved(load(config, "--data.as_chat", "false", "--evaluation.exact_match", "true"))


@pytest.mark.parametrize(
    ("field", "row_format", "message"),
    [
        (
            "instrution",
            "auto",
            r"instrution in the fields of train is no .*; did you mean instruction\? .*sharegpt: conv",
        ),
        (
            "prompt",
            "alpaca",
            r"prompt in the fields of train is no field of a format \(alpaca: instruction, output, in",
        ),
    ],
)
def test_a_field_that_the_format_does_not_have_is_refused(config, field, row_format, message):
    source = {"path": str(config.parent / "train.jsonl"), "fields": {field: "instruction"}, "format": row_format}
    with pytest.raises(ValueError, match=message):
        resolved(load(config, "--data.train", json.dumps([source])))


def test_an_example_beyond_the_models_context_is_refused(config):
    words = " ".join(["w1"] * 300)
    (config.parent / "long.jsonl").write_text(json.dumps({"prompt": "w1", "completion": words}) + "\n")
    for part in ("train", "eval"):
        sources = {"train": str(config.parent / "train.jsonl"), "eval": "null"}
        sources[part] = json.dumps([str(config.parent / "train.jsonl"), str(config.parent / "long.jsonl")])
        overrides = [f"--data.{name}={value}" for name, value in sources.items()]
        with pytest.raises(
            ValueError, match="longest example of long has 302 tokens, more than the model's context of 256"
        ):
            resolved(load(config, *overrides))


def test_roberta_has_fewer_positions_than_its_configuration_says(tmp_path):
    for architecture, context in (("bert", 64), ("roberta", 63), ("llama", 64)):
        folder = save_tiny_encoder(tmp_path / architecture, architecture)
        skeleton = load_skeleton(BaseModelSpec(path=str(folder), task=CLASSIFICATION))
        assert resolve.context_of(skeleton) == context
    model = AutoModel.from_pretrained(tmp_path / "roberta")
    model(input_ids=torch.full((1, 63), 7))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 64), 7))


def test_first_examples_of_one_label_alone_are_told(tmp_path):
    config = write_classification(tmp_path)
    header, *rows = (tmp_path / "eval.tsv").read_text().splitlines()
    rows.sort(key=lambda row: row.split("\t")[header.split("\t").index("label")])
    (tmp_path / "eval.tsv").write_text("\n".join([header, *rows]) + "\n")

    def told(*options):
        return [remark for remark in resolved(load(config, *options)).remarks() if "the label" in remark]

    (remark,) = told("--evaluation.max_examples", "4")
    assert remark.startswith(
        "warning: evaluation.max_examples 4 takes the first examples of eval, which all have the label 'not_same'"
    )
    assert told() == told("--evaluation.max_examples", "20") == []


def test_f1_wants_two_classes_and_labels_belong_to_the_settings(tmp_path):
    config = write_classification(tmp_path)
    assert resolved(load(config)).fingerprint.labels == ["not_same", "same"]
    assert resolved(load(config, "--evaluation.metrics", "[f1]")).fingerprint.task == CLASSIFICATION
    table = tmp_path / "train.tsv"
    table.write_text(table.read_text() + "60\tw1\tw2\tperhaps\n")
    with pytest.raises(ValueError, match="f1, which is of the second of two classes, but there are 3: not_same, per"):
        resolved(load(config, "--evaluation.metrics", "[f1]"))


def test_new_tokens_are_decided_before_a_weight_is_read(config):
    """The rows of the embedding, the data, and the fingerprint have them; without them nothing is other than before."""
    settings = load(config, "--adapter.new_tokens", "['<call>', w5-w6]")
    run = resolved(settings)
    assert run.tokenizer.convert_tokens_to_ids(["<call>", "w5-w6"]) == [VOCABULARY, VOCABULARY + 1]
    assert run.row_parameters == 2 * 2 * 64
    said = "tokens: 2 new (<call>, w5-w6), whose rows have 256 trained parameters, outside of the budget"
    assert said in describe(settings, run, 1)
    assert run.fingerprint.as_dict()["adapter.new_tokens"] == ["<call>", "w5-w6"]
    assert "adapter.new_tokens" not in resolved(load(config)).fingerprint.as_dict()
    with pytest.raises(ValueError, match="new_tokens has 'w5', which the tokenizer knows already, with the id 14"):
        resolved(load(config, "--adapter.new_tokens", "[w5]"))
    tiny_model(vocab_size=VOCABULARY - 1).save_pretrained(load(config).model.path)
    with pytest.raises(ValueError, match="some of its own tokens have none"):
        resolved(settings)


def test_of_a_routed_run_memory_is_a_guess_and_what_is_turned_off_is_said(config):
    settings = load(config, *ROUTED)
    assert "Activations are a guess" in render(estimate_memory(settings, 1))
    (remark,) = [line for line in resolved(settings).remarks() if "adapter.routing" in line]
    assert "as with model.fuse false and model.kernels none" in remark


def test_a_balancing_loss_over_less_than_the_global_batch_is_refused(config):
    two = ("--training.gradient_accumulation_steps", "2")
    rule = "accumulation_steps is 2, but adapter.routing is prompt, .* set adapter.balance_weight to 0 .it is 0.01"
    with pytest.raises(ValueError, match=rule):
        resolved(load(config, *ROUTED, *two))
    assert resolved(load(config, *ROUTED, *two, "--adapter.balance_weight", "0")).arguments.max_steps == 12
    # As for a run that goes on with fewer ranks, whose accumulation follows from the global batch.
    settings = load(config, *ROUTED)
    with pytest.raises(ValueError, match=rule):
        resolve.resolve_run(settings, *run_data.read_data(settings), accumulation=2)


def test_a_run_of_few_events_says_what_each_of_them_does(config):
    few = ("--pruning.rule", "grow", "--adapter.initial_rank", "null", "--pruning.interval", "5")
    remarks = resolved(load(config, *few)).remarks()
    assert any("gives 3 pruning events in 12 steps, so that each adds many components" in line for line in remarks)
