"""Criteria other than the paper's, and a budget in parameters, through the real command."""

import json
import shutil
from pathlib import Path

import pytest
from support.commands import steps_of, train
from support.same_run import assert_same_run
from support.tiny_run import write_config

SENSITIVITY = ("--pruning.importance", "gate_sensitivity", "--pruning.budget_unit", "parameters")
RELATIVE = 2e-4


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory) -> Path:
    """A run of two ranks under ZeRO-2, without dropout, a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("sensitive")
    config = write_config(folder)
    train(config, *SENSITIVITY)
    return config


def last_event(run: Path) -> dict:
    return json.loads((run / "allocation.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("overrides", "processes", "engine"),
    [
        (("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4"), 1, "none"),
        ((), 2, "ddp"),
    ],
    ids=["one process, accumulating", "ddp"],
)
def test_sensitivity_does_not_depend_on_world_size_engine_or_accumulation(
    sensitive, tmp_path, overrides, processes, engine
):
    run = tmp_path / "run"
    train(sensitive, *SENSITIVITY, *overrides, "--output_dir", str(run), processes=processes, engine=engine)
    reference = sensitive.parent / "run"
    for old, new in zip(steps_of(reference), steps_of(run), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=RELATIVE)
        assert new["allocation"] == old["allocation"]
    assert last_event(run)["kept"] == last_event(reference)["kept"]
    # Scores are not equal to those of a rank's own part of the batch: the weights of an event lie in the checkpoint.
    tensors = [folder / "checkpoint-5/dynamic_lora.safetensors" for folder in (reference, run)]
    assert_close(*tensors)


@pytest.mark.parametrize(("processes", "engine"), [(1, "none"), (2, "ddp")])
def test_rebasing_reaches_the_master_copy_and_does_not_depend_on_the_engine(sensitive, tmp_path, processes, engine):
    rebased = ("--pruning.importance", "squared_magnitude", "--pruning.rebase", "true")
    runs = tmp_path / "zero2", tmp_path / engine
    train(sensitive, *rebased, "--output_dir", str(runs[0]))
    batch = ("--training.per_device_train_batch_size", str(8 // processes))
    train(sensitive, *rebased, *batch, "--output_dir", str(runs[1]), processes=processes, engine=engine)
    for old, new in zip(*map(steps_of, runs), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=10 * RELATIVE)
        assert new["allocation"] == old["allocation"]


def assert_close(expected: Path, found: Path) -> None:
    """Scores in two checkpoints between events agree, and are not all 0."""
    from safetensors.torch import load_file

    old, new = load_file(expected), load_file(found)
    names = [name for name in old if name.endswith(".scores")]
    largest = max(float(old[name].max()) for name in names)
    assert largest > 0
    assert all(float((old[name] - new[name]).abs().max()) < RELATIVE * largest for name in names)


def test_a_resumed_run_has_the_sums_since_the_last_event(sensitive, tmp_path):
    reference = sensitive.parent / "run"
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copytree(reference / "checkpoint-5", resumed / "checkpoint-5")  # events are after steps 4 and 6
    for name in ("metrics.jsonl", "allocation.jsonl"):
        lines = (reference / name).read_text().splitlines(keepends=True)
        (resumed / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= 5))
    train(sensitive, *SENSITIVITY, "--output_dir", str(resumed))
    assert_same_run(reference, resumed)


def test_the_adapter_has_the_parameters_of_uniform_lora_and_the_report_says_how_many(sensitive):
    from safetensors.torch import load_file

    run = sensitive.parent / "run"
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    assert sum(tensor.numel() for tensor in adapter.values()) == summary["parameters_kept"]
    widths = {"q": 128, "k": 96, "v": 96, "o": 128, "gate": 192, "up": 192, "down": 192}
    uniform = 2 * 2 * sum(widths.values())  # target rank, blocks
    assert 0 <= uniform - summary["parameters_kept"] < max(widths.values())
