"""The comparisons for a GPU that is there for minutes, rehearsed on a CPU with a tiny model."""

import json
import os
import subprocess

import pytest
from support.repository import REPOSITORY
from support.tiny_run import save_tiny_model, write_rows

SCRIPT = REPOSITORY / "benchmarks" / "search_session.sh"
TASKS = ("e2e", "gsm8k", "alpaca", "multilingual", "rte")
SPLITS = ("train", "search", "report")
SMALL = {
    "--seeds": "[0]",
    "--budgets": "[2]",
    "--learning_rates": "[0.01]",
    "--run.training.max_steps": "25",
    "--run.training.per_device_train_batch_size": "2",
    "--run.evaluation.max_examples": "4",
    "--run.adapter.calibration_rows": "4",
}


def session(folder, minutes):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= {"MINUTES": str(minutes), "WORKERS": "1"}
    options = [word for option in SMALL.items() for word in option]
    command = ["bash", SCRIPT, "out", *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2700, check=True
    ).stdout.splitlines()


def write_sets(folder):
    save_tiny_model(folder / "data/models/SmolLM2-135M-Instruct")
    for task in TASKS:
        (folder / "data/evidence" / task).mkdir(parents=True)
        for seed, split in enumerate(SPLITS):
            path = write_rows(folder / f"data/evidence/{task}/{split}.jsonl", 30, seed)
            if task == "rte":
                rows = [json.loads(line)["input"] for line in path.read_text().splitlines()]
                pairs = [{"sentence1": row, "sentence2": f"{row} w{n}", "label": "w1"} for n, row in enumerate(rows)]
                path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    reported = (folder / "data/evidence/multilingual/report.jsonl").read_text().splitlines(keepends=True)
    for number, language in enumerate(("en", "fi", "fr", "zh")):
        (folder / f"data/evidence/multilingual/report-{language}.jsonl").write_text("".join(reported[number::4]))


@pytest.mark.full("benchmark")
@pytest.mark.timeout(2700)
def test_every_method_is_trained_on_every_task_once_and_tables_are_kept(tmp_path):
    write_sets(tmp_path)
    parts = session(tmp_path, 45)
    assert len(parts) == 6
    assert all(": status 0, " in line for line in parts), (tmp_path / "out/session.txt").read_text()[-5000:]
    for name in ("starts", "controls"):
        assert "loss by part" in (tmp_path / f"out/{name}-results.md").read_text()
        table = (tmp_path / f"out/{name}-results.md").read_text()
        assert ("change-inputs" in table, "mlp-only" in table) == (name == "starts", name == "controls")
        assert (tmp_path / f"out/{name}-results.json").is_file()
    cells = sorted((tmp_path / "out/search/cells").glob("*/rank2/*/lr0.01/seed0"))
    assert {cell.parents[3].name for cell in cells} == set(TASKS)
    methods = {cell.parents[1].name for cell in cells}
    assert {"lora", "inputs", "change-gradient", "lora-plus", "adalora", "eva"} < methods
    assert len(cells) == len(TASKS) * len(methods)


def test_a_session_without_time_begins_no_part(tmp_path):
    parts = session(tmp_path, 0)
    assert len(parts) == 6
    assert all(line.endswith(": no time left") for line in parts)
    assert not (tmp_path / "out/search").exists()
