"""Runs whose adapter starts from training rows."""

from pathlib import Path

import pytest
from support.forked_run import finished_run, run_that_fails, run_to_the_end
from support.same_run import assert_same_course, assert_same_run, stopped_at

SAID = "the adapter starts from 20 training rows (adapter.init inputs)"


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> tuple[Path, str]:
    """A run of two ranks under ZeRO-2 that starts from inputs, and what it printed."""
    return finished_run(tmp_path_factory.mktemp("started"), adapter={"init": "inputs", "calibration_rows": 20})


def test_the_start_and_the_course_do_not_depend_on_the_number_of_ranks(started, tmp_path):
    config, output = started
    assert output.count(SAID) == 1
    one = ("--training.gradient_accumulation_steps", "2", "--training.gradient_checkpointing", "true")
    run_to_the_end(config, tmp_path / "run", tmp_path / "log", *one, ranks=1, engine="none")
    assert_same_course(config.parent / "run", tmp_path / "run")


def test_a_resumed_run_does_not_start_again(started, tmp_path):
    config, _ = started
    resumed = stopped_at(5, config.parent / "run", tmp_path)
    assert SAID not in run_to_the_end(config, resumed, tmp_path / "log")
    assert_same_run(config.parent / "run", resumed)


def test_a_run_is_not_gone_on_with_from_another_number_of_rows(started, tmp_path):
    config, _ = started
    resumed = stopped_at(5, config.parent / "run", tmp_path)
    status, text = run_that_fails(config, resumed, tmp_path / "log", "--adapter.calibration_rows", "21")
    assert status == 2
    assert "adapter.calibration_rows was 20 and is now 21" in text


@pytest.mark.full("ranks")
def test_a_start_from_the_gradient_does_not_depend_on_the_number_of_ranks(started, tmp_path):
    gradient = ("--adapter.init", "gradient")
    runs = []
    for ranks, engine in ((2, "ddp"), (1, "none")):
        runs.append(tmp_path / engine)
        batch = ("--training.gradient_accumulation_steps", str(2 // ranks))
        run_to_the_end(started[0], runs[-1], tmp_path / f"log-{engine}", *gradient, *batch, ranks=ranks, engine=engine)
    assert_same_course(*runs)
