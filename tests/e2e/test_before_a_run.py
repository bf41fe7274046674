"""What a user does before a run: prepare the data, and a dry run."""

import json
import re

from support.forked_run import run_forked, run_to_the_end
from support.tiny_run import write_config, write_rows


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
    assert "12 optimizer steps of 4 examples on 1 process" in finished.output
    assert "  1: 56, 2: 56, 4: 53, 6: 28\n" in finished.output
    assert "Memory per GPU" in finished.output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_on_two_ranks_counts_them(tmp_path):
    config = write_config(tmp_path)
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log", "--dry-run")
    assert output.count("12 optimizer steps of 8 examples on 2 processes") == 1
    assert output.count("train: encoding 50 rows") == 1, "the other rank waited and read"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_would(tmp_path):
    config = write_config(tmp_path)
    for overrides, message in (
        (("--training.max_steps", "2"), "2 optimizer steps with warmup_fraction"),
        (
            ("--data.chat_template", "llama3", "--data.format", "messages"),
            "the tokenizer does not know <|start_header_id|>",
        ),
    ):
        finished = run_forked("train", "--config", str(config), "--dry-run", *overrides)
        assert finished.status == 2, finished.output
        assert message in finished.output
        assert "Traceback" not in finished.output
