"""What a user does before a run: prepare the data, and a dry run."""

import json
import re
import shutil

import pytest
from support.forked_run import run_forked, run_to_the_end
from support.tiny_run import write_config, write_rows


@pytest.mark.full("data")
def test_prepared_data_is_read_by_the_run(tmp_path):
    config = write_config(tmp_path)
    prepared = run_forked("prepare", str(config))
    assert prepared.status == 0, prepared.output
    assert re.search(r"^train +alpaca +50 +50 +0 +0 +850 +29\.4% +25$", prepared.output, re.MULTILINE)
    again = run_forked("prepare", str(config))
    assert "encoding" in prepared.output
    assert "encoding" not in again.output
    assert [line for line in again.output.splitlines() if line in prepared.output.splitlines()]


def test_a_bad_row_ends_in_a_message_also_where_workers_find_it(tmp_path):
    rows = write_rows(tmp_path / "many.jsonl", 2500, seed=1).read_text().splitlines()
    rows[2345] = json.dumps({"instruction": "w1", "output": 42})
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    config = write_config(tmp_path, data={"train": str(tmp_path / "many.jsonl"), "eval": None, "workers": 2})
    finished = run_forked("prepare", str(config))
    assert finished.status == 2, finished.output
    assert "Traceback" not in finished.output
    assert f"error: {tmp_path}/many.jsonl, line 2346: field 'output' must be text, got 42" in finished.output
    assert not list((tmp_path / "cache").glob("*/prepared.json"))

    skipped = run_forked("prepare", str(config), "--data.bad_rows", "skip")
    assert skipped.status == 0, skipped.output
    assert "skipped 1 of 2500 rows" in skipped.output
    (listed,) = (tmp_path / "cache").glob("*/left_out.jsonl")
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert line["place"].endswith("line 2346")


def test_a_dry_run_needs_neither_weights_nor_launcher_and_writes_nothing(tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    finished = run_forked("train", "--config", str(config), "--dry-run")
    assert finished.status == 0, finished.output
    assert "12 optimizer steps of 8 examples on 2 processes" in finished.output
    assert "  1: 56, 2: 56, 4: 53, 6: 28\n" in finished.output
    assert "Memory per GPU" in finished.output
    assert "(4 x 25)" in finished.output, "the longest row of the data, not data.max_length"
    assert "Rows of the median length, " in finished.output
    assert not (tmp_path / "run").exists()
    estimated = run_forked("estimate", str(config), "--world-size", "2")
    assert estimated.status == 0, estimated.output
    table = estimated.output[estimated.output.index("Memory per GPU") :].strip()
    assert table in finished.output, "one estimate, by the same rows"


def test_a_precision_that_only_the_launcher_has_ends_the_run_before_it_begins(tmp_path):
    config = write_config(tmp_path, distributed={"engine": "none"})
    finished = run_forked("train", "--config", str(config), ACCELERATE_MIXED_PRECISION="bf16")
    assert finished.status == 2, finished.output
    assert "error: ACCELERATE_MIXED_PRECISION is bf16 (mixed_precision of the launch file" in finished.output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists(), "no data are prepared either"


def test_a_dry_run_says_how_long_the_run_would_take(tmp_path):
    config = write_config(tmp_path, distributed={"engine": "none"})
    dry_run = ("train", str(config), "--dry-run")
    assert "Time: " not in run_forked(*dry_run).output, "no speed is known"
    given = run_forked(*dry_run, "--world-size", "1", "--tokens-per-second", "0.5").output
    said = re.search(
        r"^Time: about .* for 12 optimizer steps of (\d+) tokens in all, at 0\.5 tokens/s", given, re.MULTILINE
    )
    assert said, given
    assert said[0] in run_forked("estimate", str(config), "--tokens-per-second", "0.5").output
    run_to_the_end(config, tmp_path / "run", tmp_path / "log", ranks=1, engine="none")
    seen = run_forked(*dry_run).output
    assert re.search(rf" {said[1]} tokens in all, at .* tokens/s \(seen in {tmp_path}/run, on 1 process\)", seen), seen
    refused = run_forked("train", str(config), "--tokens-per-second", "7")
    assert refused.status == 2
    assert "--tokens-per-second is 7, but it is for --dry-run, which estimates" in refused.output


def test_a_dry_run_on_two_ranks_counts_them(tmp_path):
    config = write_config(tmp_path)
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log", "--dry-run")
    assert output.count("12 optimizer steps of 8 examples on 2 processes") == 1
    assert output.count("train: encoding 50 rows") == 1, "the other rank waited and read"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_would(tmp_path):
    config = write_config(tmp_path)
    for overrides, message in (
        (("--training.max_steps", "1"), "1 optimizer steps with warmup_fraction"),
        (
            ("--data.chat_template", "llama3", "--data.format", "messages"),
            "the tokenizer does not know <|start_header_id|>",
        ),
    ):
        finished = run_forked("train", "--config", str(config), "--dry-run", *overrides)
        assert finished.status == 2, finished.output
        assert message in finished.output
        assert "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--training.report_to", "dvclive"), "training.report_to has dvclive, which cannot be used here: "),
        (("--training.report_to", "[tensorboard, wnadb]"), "training.report_to has wnadb, which cannot be used here: "),
        (("--model.attention", "flash_attention_2"), "model.attention is 'flash_attention_2', which cannot be used"),
        (("--model.attention", "fast"), "model.attention is 'fast', which cannot be used here"),
        (
            ("--training.learning_rate", "-0.001"),
            "training.learning_rate is -0.001, but must be at least 0",
        ),
        (("--training.weight_decay", "-1"), "training.weight_decay is -1, but must be at least 0, and finite"),
        (("--training.gradient_accumulation_steps", "0"), "accumulation_steps is 0, but must be a whole number of at "),
        (("--training.per_device_train_batch_size", "0"), "train_batch_size is 0, but must be a whole number of at "),
        (("--seed", "-1"), "seed is -1, but must lie between 0 and 4294967295"),
        (("--seed", "4294967296"), "seed is 4294967296, but must lie between 0 and 4294967295"),
        (("--adapter.seed", "-1"), "adapter.seed is -1, but must lie between 0 and 4294967295"),
        (("--output_dir", "{folder}/train.jsonl"), "train.jsonl, which is a file: set output_dir to a folder"),
        (("--output_dir", "{folder}"), " holds bare, cache, eval.jsonl and 3 more, but neither run.json nor a "),
        (("--data.chat_template_kwargs.enable_thinking", "false"), "is never read by the chat template (it reads "),
        (("--data.train_on_thoughts", "false"), "data.train_on_thoughts is set, but no source is rendered in a chat"),
        (
            ("--data.train_on_thoughts", "false", "--evaluation.exact_match", "true"),
            "exact match compares answers with",
        ),
        (("--adapter.start_from", "{folder}/model"), "/model, which has no adapter_config.json: give the folder of a "),
        (("--model.path", "{folder}/bare"), "bare' holds no tokenizer that can be read ("),
    ],
)
def test_a_dry_run_and_a_run_refuse_the_same_with_one_line(once, overrides, message):
    overrides = [word.format(folder=once) for word in overrides]
    for way in ((), ("--dry-run",)):
        finished = run_forked("train", str(once / "run.yaml"), "--distributed.engine", "none", *way, *overrides)
        assert finished.status == 2, finished.output
        (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
        assert message in line
        assert "Traceback" not in finished.output
    assert not (once / "run").exists()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    write_config(folder)
    (folder / "cache").mkdir()
    (folder / "bare").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "bare")
    return folder


def test_a_dry_run_counts_the_steps_of_the_launch_that_is_meant(tmp_path):
    config = str(write_config(tmp_path, training={"max_steps": -1, "num_train_epochs": 4, "report_to": "none"}))
    for ranks, steps in (("1", "50 optimizer steps of 4 examples on 1 process,"), ("4", "13 optimizer steps of 16 ")):
        finished = run_forked("train", config, "--dry-run", "--world-size", ranks)
        assert finished.status == 0, finished.output
        assert steps in finished.output
    assert "on 4 processes" in finished.output
    for words, message in (
        (("--dry-run", "--world-size", "0"), "--world-size is 0, but must be at least 1"),
        (("--dry-run", "--world-size", "2", "--distributed.engine", "none"), "which is one process"),
        (("--world-size", "2"), "--world-size is 2, but it is for --dry-run: a run has as many ranks as are started"),
    ):
        finished = run_forked("train", config, *words)
        assert finished.status == 2, finished.output
        assert f"error: {message}" in finished.output or message in finished.output.splitlines()[-1]
