"""``dora-dist train``: it starts its own ranks, and what they have to say is said once."""

import json
import os
import signal
import subprocess

import pytest
from support.commands import BIN, run
from support.forked_run import run_forked
from support.repository import REPOSITORY
from support.tiny_run import write_config

from dora_dist.console.errors import PREEMPTED


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("command"), training={"save_steps": 1000})


def train(config, *arguments, **environment):
    return run("python", "-m", "dora_dist", "train", str(config), *arguments, DS_ACCELERATOR="", **environment)


def test_an_error_that_the_ranks_find_is_the_last_line_once_with_their_status(config, tmp_path):
    rows = (config.parent / "train.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text(f'{rows}{{"instruction": "a"}}\n')
    finished = train(config, "--data.train", str(tmp_path / "bad.jsonl"), "--output_dir", str(tmp_path / "run"))
    assert finished.status == 2, finished.output
    assert finished.output.splitlines()[-1].startswith(
        f"error: {tmp_path}/bad.jsonl, line 51: field 'output' is missing"
    )
    assert finished.output.count("line 51") == 1
    assert "Traceback" not in finished.output


def test_an_error_of_the_command_line_is_said_before_any_rank_is_started(config):
    finished = train(config, "--adapter.targt_rank", "3")
    assert (finished.status, finished.output) == (
        2,
        "error: unknown key adapter.targt_rank; did you mean adapter.target_rank?\n",
    )


def test_data_that_are_not_there_are_said_before_any_rank_is_started(config):
    finished = train(config, "--data.train", "nope.jsonl")
    assert (finished.status, finished.output) == (
        2,
        f"error: no data file matches 'nope.jsonl' (looked from {REPOSITORY}): correct data.train or data.eval\n",
    )


@pytest.mark.full("faults")
def test_it_is_told_to_stop_and_ends_with_the_status_of_a_run_that_goes_on(config, tmp_path):
    command = [BIN / "python", "-m", "dora_dist", "train", config, "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    process = subprocess.Popen(
        [*map(str, command), "--training.max_steps", "5000"],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == PREEMPTED, said
    assert said.splitlines()[-1].startswith("preempted at step ")
    assert "Traceback" not in said


@pytest.mark.full("install")
@pytest.mark.parametrize("engine", ["ddp", "none"])
def test_other_engines_are_started_too(config, engine, tmp_path):
    finished = train(config, "--distributed.engine", engine, "--output_dir", str(tmp_path / "run"))
    assert finished.status == 0, finished.output
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["processes"] == (2 if engine == "ddp" else 1)


@pytest.mark.parametrize("name", [pytest.param("RANK", marks=pytest.mark.full("faults")), "SLURM_PROCID"])
def test_a_batch_script_is_no_rank(config, name):
    """Only RANK and WORLD_SIZE together make one, which would refuse to start ranks of its own."""
    finished = run_forked("train", str(config), "--processes", "0", **{name: "0"})
    assert finished.output.endswith("error: --processes is 0, but must be at least 1\n")
