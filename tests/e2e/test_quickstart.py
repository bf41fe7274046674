"""The main job, through the README's command."""

import json
import re

import pytest
from support.commands import run
from support.repository import REPOSITORY


@pytest.mark.full("install")
@pytest.mark.timeout(900)
def test_the_quickstart_learns_its_task_within_the_budget():
    finished = run("bash", "launch/quickstart.sh", timeout=840, OMP_NUM_THREADS="", DS_ACCELERATOR="")
    assert finished.status == 0, finished.output
    folder = REPOSITORY / re.search(r"^Run (\S+),", finished.output, re.MULTILINE)[1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["exact_match"] < 0.2
    assert summary["after"]["exact_match"] > 0.8
    assert summary["after"]["loss"] < summary["before"]["loss"] / 4
    layers = len(summary["ranks"])
    assert summary["components_at_start"] == 12 * layers
    assert summary["components_kept"] == sum(summary["ranks"].values())
    # To within one component of the parameters of rank 8: a component of the MLP has 128 + 256.
    wanted = 8 * layers // 7 * (4 * (128 + 128) + 3 * (128 + 256))
    assert wanted - (128 + 256) < summary["parameters_kept"] <= wanted
    assert len(set(summary["ranks"].values())) > 1, "every layer kept the same rank"
    for name in ("adapter/adapter_model.safetensors", "ranks.png", "progress.png", "metrics.jsonl", "tensorboard"):
        assert (folder / name).exists(), name
        assert str(folder.relative_to(REPOSITORY)) in finished.output
    assert "Traceback" not in finished.output
    assert "Warning" not in finished.output


@pytest.mark.full("install")
@pytest.mark.timeout(900)
def test_a_real_model_is_fetched_once_and_tuned(tmp_path):
    """As many steps as show that it learns; the whole run takes minutes."""
    arguments = ("--model", "smollm2", "--output", tmp_path / "smollm2")
    fetched = run("python", "-m", "dora_dist", "quickstart", *arguments, "--yes", "--prepare-only", timeout=300)
    assert fetched.status == 0, fetched.output
    keys = {"training.max_steps": 12, "evaluation.max_examples": 4, "evaluation.exact_match": "false"}
    given = [word for key, value in keys.items() for word in (f"--{key}", value)]
    finished = run("python", "-m", "dora_dist", "quickstart", *arguments, *given, timeout=600, DS_ACCELERATOR="")
    assert finished.status == 0, finished.output
    assert "is up to date" in finished.output
    (folder,) = (tmp_path / "smollm2").glob("run-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] / 4
    assert len(summary["ranks"]) == 7 * 30
