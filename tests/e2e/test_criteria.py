"""Criteria other than the paper's, and a budget in parameters."""

import json
from pathlib import Path

import pytest
from support.commands import steps_of
from support.forked_run import finished_run, run_to_the_end
from support.same_run import RELATIVE, assert_same_course, assert_same_run, stopped_at
from support.tiny_run import write_config


@pytest.fixture(
    scope="module", params=["gate_sensitivity", pytest.param("loss_change", marks=pytest.mark.full("ranks"))]
)
def summed(request, tmp_path_factory) -> Path:
    """A run of two ranks under ZeRO-2, without dropout, by scores that are summed over steps, a checkpoint after every
    step."""
    pruning = {"importance": request.param, "budget_unit": "parameters"}
    return finished_run(tmp_path_factory.mktemp(request.param), pruning=pruning)[0]


@pytest.mark.parametrize(
    ("overrides", "ranks", "engine"),
    [
        (("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4"), 1, "none"),
        ((), 2, "ddp"),
    ],
    ids=["one process, accumulating", "ddp"],
)
def test_sums_over_steps_do_not_depend_on_world_size_engine_or_accumulation(summed, tmp_path, overrides, ranks, engine):
    run = tmp_path / "run"
    run_to_the_end(summed, run, tmp_path / "log", *overrides, ranks=ranks, engine=engine)
    reference = summed.parent / "run"
    assert_same_course(reference, run)
    # Scores are not equal to those of a rank's own part of the batch: the weights of an event lie in the checkpoint.
    tensors = [folder / "checkpoint-5/dynamic_lora.safetensors" for folder in (reference, run)]
    assert_close(*tensors)


@pytest.mark.full("ranks")
def test_rebasing_reaches_the_master_copy_and_does_not_depend_on_the_engine(tmp_path):
    config = write_config(tmp_path)
    rebased = ("--pruning.importance", "squared_magnitude", "--pruning.rebase", "true")
    runs = []
    for engine, ranks in (("zero2", 2), ("none", 1), ("ddp", 2)):
        runs.append(tmp_path / engine)
        batch = ("--training.per_device_train_batch_size", str(8 // ranks))
        run_to_the_end(config, runs[-1], tmp_path / f"log-{engine}", *rebased, *batch, ranks=ranks, engine=engine)
    for run in runs[1:]:
        for old, new in zip(steps_of(runs[0]), steps_of(run), strict=True):
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


def test_a_resumed_run_has_the_sums(summed, tmp_path):
    reference = summed.parent / "run"
    resumed = stopped_at(5, reference, tmp_path)  # events are after steps 4 and 6
    run_to_the_end(summed, resumed, tmp_path / "log")
    assert_same_run(reference, resumed)


def test_the_adapter_has_the_parameters_of_uniform_lora_and_the_report_says_how_many(summed):
    from dora_dist.adapter.plain_lora import read_lora_adapter

    run = summed.parent / "run"
    adapter = read_lora_adapter(run / "adapter")
    summary = json.loads((run / "summary.json").read_text())
    assert sum(part.numel() for parts in adapter.values() for part in parts) == summary["parameters_kept"]
    widths = {"q": 128, "k": 96, "v": 96, "o": 128, "gate": 192, "up": 192, "down": 192}
    uniform = 2 * 2 * sum(widths.values())  # target rank, blocks
    assert 0 <= uniform - summary["parameters_kept"] < max(widths.values())
