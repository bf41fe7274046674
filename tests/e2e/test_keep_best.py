"""``evaluation.keep_best`` and ``early_stopping``: the run ends with the adapter of its best checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.forked_run import finished_run, run_that_fails, run_to_the_end
from support.same_run import assert_same_run, stopped_at

from dora_dist.console.files import read_lines
from dora_dist.runs.checkpoint import checkpoints, read_method_state

FINAL_EVENT, PATIENCE = 6, 3
END = FINAL_EVENT + PATIENCE
"""A model of random weights answers nothing right, so that no evaluation is better than the first that counts."""
SECTIONS = {
    "evaluation": {"exact_match": True, "max_new_tokens": 2, "keep_best": "exact_match", "early_stopping": PATIENCE},
    "checkpoint": {"keep_last": 2},
    "training": {"eval_strategy": "steps", "eval_steps": 1},
}


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, Path, str]:
    """Configuration, folder and output of a run that was ended early."""
    folder = tmp_path_factory.mktemp("best")
    config, output = finished_run(folder, **SECTIONS)
    return config, folder / "run", output


def test_the_best_checkpoint_is_kept_and_its_adapter_is_that_of_the_run(stopped):
    _, run, output = stopped
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{n}" for n in (FINAL_EVENT, END - 1, END)]
    assert same(adapter(run / "adapter"), adapter(run / f"checkpoint-{FINAL_EVENT}"))
    assert not same(adapter(run / "adapter"), adapter(run / f"checkpoint-{END}"))
    summary = json.loads((run / "summary.json").read_text())
    lines = read_lines(run / "metrics.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == list(range(1, END + 1))
    assert summary["after"]["loss"] == losses[FINAL_EVENT] != losses[END]
    assert (summary["best"], summary["steps"]) == ({"step": FINAL_EVENT, "figure": "exact_match"}, END)
    said = f"no better exact_match in {PATIENCE} evaluations since step {FINAL_EVENT}; the run ends at step {END} of 12"
    assert output.count(said) == 1
    assert f"best checkpoint  of step {FINAL_EVENT}, by exact_match" in output
    card = (run / "adapter" / "README.md").read_text()
    assert f"of step {FINAL_EVENT}, the best one by held-out exact_match" in card


@pytest.mark.full("ranks")
@pytest.mark.parametrize("step", [FINAL_EVENT, END - 1, END])
def test_a_resumed_run_ends_with_the_same_best_one_and_takes_no_step_more(stopped, tmp_path, step):
    config, run, _ = stopped
    resumed = stopped_at(step, run, tmp_path)
    if step > FINAL_EVENT:
        shutil.copytree(run / f"checkpoint-{FINAL_EVENT}", resumed / f"checkpoint-{FINAL_EVENT}")
    run_to_the_end(config, resumed, tmp_path / "log")
    assert same(adapter(resumed / "adapter"), adapter(run / "adapter"))
    states = [read_method_state(folder / f"checkpoint-{END}")["best"] for folder in (run, resumed)]
    assert states[0] == states[1]
    if step < END:  # whose evaluation is made twice, and recorded so
        assert_same_run(run, resumed)


@pytest.mark.full("ranks")
def test_a_resume_without_the_best_one_is_refused_and_may_do_without(stopped, tmp_path):
    config, run, _ = stopped
    resumed = stopped_at(END - 1, run, tmp_path)
    status, text = run_that_fails(config, resumed, tmp_path / "log")
    assert status == 2
    named = (
        f"names checkpoint-{FINAL_EVENT} as the best one so far, but {resumed}/checkpoint-{FINAL_EVENT} cannot be used"
    )
    assert named in text
    run_to_the_end(
        config, resumed, tmp_path / "log2", "--evaluation.keep_best", "null", "--evaluation.early_stopping", "null"
    )
    assert same(adapter(resumed / "adapter"), adapter(resumed / "checkpoint-12"))


@pytest.mark.full("ranks")
@pytest.mark.parametrize("engine", ["ddp", "none"])
def test_other_engines_find_the_same_best_one(stopped, tmp_path, engine):
    config, _, _ = stopped
    ranks, rows = (2, "4") if engine == "ddp" else (1, "8")
    options = ("--training.per_device_train_batch_size", rows)
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log", *options, ranks=ranks, engine=engine)
    assert f"best checkpoint  of step {FINAL_EVENT}, by exact_match" in output
    assert same(adapter(tmp_path / "run" / "adapter"), adapter(tmp_path / "run" / f"checkpoint-{FINAL_EVENT}"))
