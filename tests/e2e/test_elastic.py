"""A run that was saved on some ranks goes on with more or fewer of them.

All runs here have a global batch of 8, without dropout; tolerances are those of docs/numerics.md for runs on different
numbers of ranks.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.forked_run import run_that_fails, run_to_the_end, runs_left_alone
from support.same_run import assert_same_course
from support.tiny_run import write_config

FULL = pytest.mark.full("ranks")
ACCUMULATION = {1: "4", 2: "2", 4: "1"}  # batches of 2 on each rank


def accumulate(ranks):
    return ("--training.gradient_accumulation_steps", ACCUMULATION[ranks])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return write_config(folder, training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})


@pytest.fixture(scope="module")
def whole(config):
    return runs_left_alone(config, accumulate)


def interrupted_at(step, source, output):
    output.mkdir()
    shutil.copytree(source / f"checkpoint-{step}", output / f"checkpoint-{step}")
    for name in ("metrics.jsonl", "allocation.jsonl"):
        shutil.copy(source / name, output / name)
    return output


def assert_same_end(expected, found):
    assert_same_course(expected, found)
    states = [load_file(folder / "checkpoint-12" / "dynamic_lora.safetensors") for folder in (expected, found)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if value.dtype == torch.bool:
            assert torch.equal(value, states[1][name]), name
        elif name.endswith(".scores"):
            torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (2, 1, 5),
        pytest.param(1, 2, 3, marks=FULL),
        pytest.param(2, 4, 9, marks=FULL),
        pytest.param(4, 2, 5, marks=FULL),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(before, after, step, config, whole, tmp_path):
    source = whole(before)
    output = interrupted_at(step, source, tmp_path / "run")
    # The configuration still says what the first start had: the accumulation follows from the global batch.
    text = run_to_the_end(config, output, tmp_path / "log", *accumulate(before), ranks=after)
    assert f"resuming from {output}/checkpoint-{step}" in text
    assert f"it was written by {before} processes, and these are {after}: " in text
    assert f"gradient_accumulation_steps is {ACCUMULATION[after]} from here on" in text
    assert_same_end(source, output)
    state = json.loads((output / "checkpoint-12" / "dynamic_lora.json").read_text())
    assert state["processes"] == after
    assert len(list((output / "checkpoint-12" / "optimizer").glob("rank-*"))) == after


def test_a_finished_run_is_left_alone_by_another_number_of_ranks(config, whole, tmp_path):
    text = run_to_the_end(config, whole(2), tmp_path / "log", *accumulate(1), ranks=1)
    assert "holds a finished run with these settings" in text


@FULL
def test_twice_there_and_back_is_the_same_run_still(config, whole, tmp_path):
    output = interrupted_at(3, whole(2), tmp_path / "run")
    run_to_the_end(config, output, tmp_path / "four", ranks=4)
    for path in output.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 7:
            shutil.rmtree(path)
    (output / "summary.json").unlink()
    run_to_the_end(config, output, tmp_path / "one", ranks=1)
    assert_same_end(whole(2), output)


def test_a_global_batch_that_cannot_be_had_is_refused_with_what_could(config, whole, tmp_path):
    output = interrupted_at(5, whole(2), tmp_path / "run")
    status, text = run_that_fails(config, output, tmp_path / "log", ranks=3)
    assert status == 2, text
    assert "was written by 2 processes with a global batch of 8, which 3 processes" in text
    assert "use a number of processes that divides it" in text
    three = ("--training.per_device_train_batch_size", "3")
    status, text = run_that_fails(config, output, tmp_path / "log-one", *three, ranks=1)
    assert status == 2, text
    assert "set training.per_device_train_batch_size to one of 1, 2, 4, 8" in text
    assert "Traceback" not in text
