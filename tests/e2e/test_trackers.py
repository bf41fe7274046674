"""Trackers under two ranks, offline: what they have kept of a run that was killed, and of the one that went on."""

import os
import signal
import time
from importlib.util import find_spec
from io import BytesIO

import numpy as np
import pytest
import yaml
from PIL import Image
from support.forked_run import log_of, run_forked, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config
from support.tracked import READERS, tracked_rank

from dora_dist.console.files import read_lines

PACKAGES = ("wandb", "mlflow", "trackio")
TRACKERS = [pytest.param(name, marks=pytest.mark.full("trackers")) for name in ("tensorboard", *PACKAGES)]
KEPT_SECONDS = 45
"""How long a tracker may take to write down what it has been given. Weights & Biases does it every 15 seconds."""


def figures(run):
    """(step, name) -> value, of all figures of training and evaluation that a run has recorded."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line or "eval_loss" in line]
    return {
        (line["step"], name): pytest.approx(value, rel=1e-6, abs=1e-9)  # TensorBoard keeps float32
        for line in lines
        for name, value in line.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }


def kept(tracked, wanted):
    """What a tracker has last been given of these figures."""
    return {key: tracked.figures[key][-1] for key in wanted if key in tracked.figures}


def start(tracker, folder):
    overrides = ("--training.report_to", tracker, "--evaluation.before", "true", "--training.save_steps", "4")
    more = (str(folder),)
    return start_run(folder / "run.yaml", folder / "run", folder / "log", *overrides, target=tracked_rank, more=more)


def stop_after_step(step, folder, processes):
    """Stop the second rank after a step, so that the first waits for it."""
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.is_file() and any(line["step"] >= step for line in read_lines(metrics))):
        assert all(process.is_alive() for process in processes), log_of(folder / "log")
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGSTOP)


def kill_when_kept(wanted, tracker, folder, processes):
    """Kill both ranks when the tracker has these figures, or has not come to it for too long."""
    deadline = time.monotonic() + KEPT_SECONDS
    while kept(only_run(tracker, folder)[1], wanted) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    wait_for_ranks(processes, timeout=60)


def only_run(tracker, folder):
    ((name, tracked),) = READERS[tracker](folder).items()
    return name, tracked


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_all_of_a_run_that_was_killed_and_went_on(tmp_path, tracker):
    pytest.importorskip(tracker, reason=f'the package {tracker} is not installed: pip install "dora-dist[{tracker}]"')
    write_config(tmp_path)
    processes = start(tracker, tmp_path)
    stop_after_step(6, tmp_path, processes)
    so_far = figures(tmp_path / "run")
    kill_when_kept(so_far, tracker, tmp_path, processes)
    name, killed = only_run(tracker, tmp_path)
    assert kept(killed, so_far) == so_far
    assert killed.pictures.keys() == {1, 2, 4, 6}

    processes = start(tracker, tmp_path)
    wait_for_ranks(processes, timeout=120)
    assert [process.exitcode for process in processes] == [0, 0], log_of(tmp_path / "log")
    assert "resuming from" in log_of(tmp_path / "log")
    again, whole = only_run(tracker, tmp_path)
    assert again == name, "a resumed run goes on in the history of the run that it resumes"
    wanted = figures(tmp_path / "run")
    assert {step for step, entry in wanted if entry == "loss"} == set(range(1, 13))
    assert {step for step, entry in wanted if entry == "eval_loss"} == {0, 12}
    assert kept(whole, wanted) == wanted
    repeated = [] if tracker == "tensorboard" else [5, 6]  # after checkpoint-4
    assert [step for (step, entry), values in whole.figures.items() if entry == "loss" and values[1:]] == repeated

    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert whole.config == config
    assert whole.pictures.keys() == {line["step"] for line in read_lines(tmp_path / "run" / "allocation.jsonl")}
    last, drawn = (
        np.asarray(Image.open(file).convert("RGB"))
        for file in (BytesIO(whole.pictures[max(whole.pictures)]), tmp_path / "run" / "ranks.png")
    )
    assert (last == drawn).all()
    assert whole.end == {"wandb": 0, "mlflow": "FINISHED"}.get(tracker)


@pytest.mark.parametrize("tracker", PACKAGES)
def test_a_tracker_without_its_package_ends_a_dry_run_with_the_command_that_installs_it(tmp_path, tracker):
    if find_spec(tracker) is not None:
        pytest.skip(f"the package {tracker} is installed")
    alone = ("--distributed.engine", "none", "--training.report_to", tracker)
    finished = run_forked("train", str(write_config(tmp_path)), "--dry-run", *alone)
    assert finished.status == 2, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
    assert f'it needs the package {tracker}: pip install "dora-dist[{tracker}]", or set training.report_to to' in line
    assert "Traceback" not in finished.output


@pytest.mark.full("trackers")
@pytest.mark.parametrize(
    ("tracker", "options", "environment", "message"),
    [
        ("wandb", (), {"WANDB_MODE": "online"}, "log in (wandb login), or set WANDB_MODE=offline"),
        ("mlflow", (), {"MLFLOW_TRACKING_URI": "nowhere://here"}, "set MLFLOW_TRACKING_URI in the environment to"),
        ("trackio", ("--training.trackio_space_id", "a/b"), {}, "log in (hf auth login), or leave out training."),
    ],
)
def test_a_tracker_that_does_not_start_ends_the_run_before_the_model_is_loaded(
    tmp_path, tracker, options, environment, message
):
    pytest.importorskip(tracker, reason=f'the package {tracker} is not installed: pip install "dora-dist[{tracker}]"')
    config = write_config(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not a model: who reads it says so")
    alone = ("--distributed.engine", "none", "--training.report_to", tracker, *options)
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub"), "TRACKIO_DIR": str(tmp_path / "trackio")}
    finished = run_forked("train", str(config), *alone, **home, **environment)
    assert finished.status == 2, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: training.report_to has {tracker}, which does not start: ")
    assert message in line
    assert "Traceback" not in finished.output
