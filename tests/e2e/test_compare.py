"""Comparisons: shared by workers, killed and started again, with a cell that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import evidence_data
import peft
import pytest
import torch
from support.commands import run
from support.comparison import write_comparison
from support.forked_run import run_forked
from support.mathematics import save_model_that_says, write_mathematics
from support.repository import REPOSITORY
from support.tiny_models import load_base

from dora_dist.console.errors import PREEMPTED
from dora_dist.runs.checkpoint import checkpoints

pytestmark = [pytest.mark.full("compare"), pytest.mark.timeout(900)]
ONE_CELL = {"methods": ["dynamic"], "baseline": "dynamic", "seeds": [1], "learning_rates": [0.01]}


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def group_of(results: dict[str, Any], method: str) -> dict[str, Any]:
    (group,) = (group for group in results["groups"] if group["method"] == method)
    return group


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison by two workers: its configuration and what the command printed."""
    folder = tmp_path_factory.mktemp("compared")
    config = write_comparison(folder, methods=["lora", "adalora", "dynamic"])
    finished = run_forked("compare", str(config), "--workers", "2", timeout=800)
    assert finished.status == 0, finished.output
    return config, finished.output


def test_two_workers_share_the_cells(compared):
    config, output = compared
    results = results_of(config.parent / "out")
    assert results["complete"]
    assert len(results["cells"]) == 3 * (2 + 1)
    lines = [line for line in output.splitlines() if line.startswith("[")]
    assert len(lines) == len(results["cells"])
    assert "Traceback" not in output
    for name in ("results.md", "comparison.png", "ranks.png"):
        assert (config.parent / "out" / name).stat().st_size


def test_rates_are_chosen_on_the_search_split_and_the_other_one_is_reported(compared):
    results = results_of(compared[0].parent / "out")
    for method in ("lora", "adalora", "dynamic"):
        group, cells = group_of(results, method), [cell for cell in results["cells"] if cell["method"] == method]
        searched = {cell["learning_rate"]: cell["search"] for cell in cells if cell["seed"] == 1}
        assert group["learning_rate"] == min(searched, key=searched.get)
        reported = [cell["reported"] for cell in cells if cell["learning_rate"] == group["learning_rate"]]
        assert len(reported) == 2
        assert group["mean"] == pytest.approx(sum(reported) / 2)
    for cell in results["cells"]:
        metrics = (compared[0].parent / "out" / cell["folder"] / "metrics.jsonl").read_text().splitlines()
        last = json.loads(metrics[-1])
        assert last["step"] == 12
        assert (last["eval_search_loss"], last["eval_reported_loss"]) == (cell["search"], cell["reported"])


def test_differences_are_those_of_the_same_seed(compared):
    results = results_of(compared[0].parent / "out")
    lora, dynamic = group_of(results, "lora")["reported"], group_of(results, "dynamic")
    expected = [dynamic["reported"][seed] - lora[seed] for seed in ("1", "2")]
    assert dynamic["difference"]["mean"] == pytest.approx(sum(expected) / 2)
    assert dynamic["difference"]["low"] < min(expected)
    assert group_of(results, "lora")["difference"] is None


def test_every_cell_leaves_a_plain_adapter_of_its_budget_and_no_checkpoints(compared):
    folder = compared[0].parent
    for cell in results_of(folder / "out")["cells"]:
        run_folder = folder / "out" / cell["folder"]
        assert not checkpoints(run_folder)
        assert sum(cell["ranks"].values()) == 2 * len(cell["ranks"])
        base = load_base(folder / "model", "nf4", torch.float32)
        stock = peft.PeftModel.from_pretrained(base, run_folder / "adapter")
        loaded = {name: p for name, p in stock.named_parameters() if "lora_" in name}
        assert {min(p.shape) for p in loaded.values()} == {8}  # the rank that all are padded to
        components = {name: int((p.flatten(1) != 0).any(1).sum()) for name, p in loaded.items() if ".lora_A." in name}
        assert sum(components.values()) == sum(cell["ranks"].values())
        widths = {
            name: p.shape[1] + loaded[name.replace(".lora_A.", ".lora_B.")].shape[0]
            for name, p in loaded.items()
            if ".lora_A." in name
        }
        assert cell["parameters"] == sum(components[name] * width for name, width in widths.items())
        if cell["method"] == "lora":
            assert set(cell["ranks"].values()) == {2}


def test_what_is_finished_is_not_run_again_and_reported_from_its_files(compared):
    config, _ = compared
    written = {path: path.stat().st_mtime_ns for path in config.parent.glob("out/cells/**/metrics.jsonl")}
    before = results_of(config.parent / "out")
    finished = run_forked("compare", str(config), timeout=200)
    assert finished.status == 0, finished.output
    assert not [line for line in finished.output.splitlines() if line.startswith("[")]
    again = run_forked("compare", str(config), "--report")
    assert again.status == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in written} == written
    after = results_of(config.parent / "out")
    assert (after["groups"], after["cells"]) == (before["groups"], before["cells"])


def test_cells_made_otherwise_are_not_taken_for_those_asked_for(compared):
    for way in ("--report", "--workers=1"):
        finished = run_forked("compare", str(compared[0]), way, "--run.pruning.interval", "3")
        assert finished.status == 2
        assert "was made with pruning.interval 2, but now it is 3" in finished.output
        assert "Traceback" not in finished.output


def test_other_held_out_data_are_noticed(compared, tmp_path):
    """The trainer itself only knows what it trained on."""
    config, _ = compared
    rows = config.parent / "a.jsonl"
    kept = rows.read_text()
    rows.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    finished = run_forked("compare", str(config))
    rows.write_text(kept)
    assert finished.status == 2
    assert "was made with examples of reported" in finished.output


def test_told_to_stop_and_then_killed_a_comparison_ends_with_the_same_figures(tmp_path):
    config = write_comparison(tmp_path, **ONE_CELL)
    whole = run_forked("compare", str(config), "--output_dir", str(tmp_path / "whole"))
    assert whole.status == 0, whole.output

    cell = tmp_path / "out" / "cells" / "echo" / "rank2" / "dynamic" / "lr0.01" / "seed1"
    stopped = start_until(config, cell, step=2)
    stopped.terminate()
    assert stopped.wait(timeout=120) == PREEMPTED
    killed = start_until(config, cell, step=7)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (cell / "summary.json").exists()

    resumed = run_forked("compare", str(config))
    assert resumed.status == 0, resumed.output
    assert (cell / "log.txt").read_text().count("resuming from") == 2
    first, second = results_of(tmp_path / "whole"), results_of(tmp_path / "out")
    for key in ("search", "reported", "ranks", "parameters"):
        assert first["cells"][0][key] == second["cells"][0][key]


def start_until(config: Path, cell: Path, step: int) -> subprocess.Popen:
    """A comparison by two workers that has just written a checkpoint of this step or a later one in the cell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "dora_dist", "compare", str(config), "--workers", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    end = time.monotonic() + 240
    while not any(int(folder.name.rsplit("-", 1)[1]) >= step for folder in checkpoints(cell)):
        assert time.monotonic() < end, "no checkpoint has been written"
        assert process.poll() is None, "the comparison has ended before it could be stopped"
        time.sleep(0.002)
    return process


def test_a_cell_that_fails_is_reported_and_the_ranks_of_a_launcher_run_the_others(tmp_path):
    config = write_comparison(tmp_path, seeds=[1], learning_rates=[0.01])
    stranger = tmp_path / "out" / "cells" / "echo" / "rank2" / "dynamic" / "lr0.01" / "seed1" / "adapter"
    stranger.mkdir(parents=True)
    finished = run("torchrun", "--nproc_per_node", "2", "-m", "dora_dist.compare", str(config))
    assert finished.status == 1
    assert "FAILED: ValueError: output_dir" in finished.output
    assert "1 of 2 table rows are incomplete" in finished.output
    results = results_of(tmp_path / "out")
    assert not results["complete"]
    assert group_of(results, "lora")["mean"] is not None
    (missing,) = group_of(results, "dynamic")["missing"]
    assert "holds adapter" in missing
    table = (tmp_path / "out" / "results.md").read_text()
    assert "## Missing" in table
    assert missing in table

    stranger.rmdir()
    mended = run_forked("compare", str(config))
    assert mended.status == 0, mended.output
    assert len([line for line in mended.output.splitlines() if line.startswith("[")]) == 1
    difference = group_of(results_of(tmp_path / "out"), "dynamic")["difference"]
    assert difference["mean"] is not None
    assert difference["low"] is None


def test_the_benchmark_of_peft_goes_from_published_files_to_a_table(tmp_path):
    """On a model that answers 7 to everything, to questions for a last digit."""
    evidence_data.main([str(write_mathematics(tmp_path / "sets", 340, 30)), str(tmp_path), "--only", "metamathqa"])
    rows = {name: tmp_path / "metamathqa" / f"{name}.jsonl" for name in ("train", "search", "report")}
    changes = {
        "output_dir": tmp_path / "out",
        "seeds": [0],
        "learning_rates": [1e-4],
        "tasks.gsm8k.data.train": rows["train"],
        "tasks.gsm8k.data.eval": rows["report"],
        "tasks.gsm8k.search": rows["search"],
        "run.model.path": save_model_that_says("7", tmp_path / "model"),
        "run.model.compute_dtype": "float32",
        "run.data.cache_dir": tmp_path / "cache",
        "run.training.max_steps": 20,
        "run.evaluation.max_new_tokens": 1,
        "run.evaluation.max_examples": 30,
    }
    options = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    finished = run_forked("compare", "configs/compare/metamathqa.yaml", *options, timeout=800)
    assert finished.status == 0, finished.output
    results = results_of(tmp_path / "out")
    assert len(results["cells"]) == len(results["groups"]) == 4
    searched = sum(json.loads(line)["completion"].endswith("7") for line in rows["search"].open().readlines()[:30])
    for cell in results["cells"]:
        assert (cell["search"], cell["reported"]) == (searched / 30, 3 / 30)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "final_number, mean" in table
    assert table.count("| 0.1000 ± n/a |") == 4
    assert {sum(cell["ranks"].values()) for cell in results["cells"] if "early" not in cell["method"]} == {4 * 32}
