"""Every launch that would train something else than was asked for ends in an error, in time."""

import json

import pytest
from support.commands import ZERO2, run
from support.repository import REPOSITORY
from support.tiny_run import write_config

FULL = pytest.mark.full("install")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return ("-m", "dora_dist.train", "--config", str(write_config(tmp_path_factory.mktemp("launch"))))


def assert_refused(finished, message):
    """All ranks end; one says why, and the launcher quotes it in its last words."""
    assert finished.status != 0
    assert "step " not in finished.output, "it trained before it found out"
    lines = finished.output.splitlines()
    assert [line for line in lines if " error: " in line and message in line and line.startswith("[rank 0]")], lines
    assert len([line for line in lines if line.startswith("[rank")]) == 1, finished.output
    quoted = [line for line in lines if line.strip().startswith("traceback : error: ")]
    assert quoted, finished.output
    assert all(message in line for line in quoted)


@FULL
def test_a_forced_cpu_under_which_accelerate_trains_with_plain_ddp(arguments):
    finished = run(*ZERO2, *arguments, ACCELERATE_USE_CPU="1", timeout=120)
    assert_refused(finished, "ACCELERATE_USE_CPU is set")


@pytest.mark.full("install")
def test_a_launch_without_deepspeed(arguments):
    finished = run("torchrun", "--nproc_per_node", "2", *arguments, timeout=120)
    assert_refused(finished, "this process was not launched with DeepSpeed")


@FULL
def test_ddp_on_cpus_that_accelerate_would_take_for_worlds_of_one(arguments):
    finished = run("torchrun", "--nproc_per_node", "2", *arguments, "--distributed.engine", "ddp", timeout=120)
    assert_refused(finished, "each process for a world of its own")


@FULL
def test_accelerate_itself_refuses_a_cpu_launch_of_deepspeed(arguments):
    """If this fails, such a launch may have become possible, or silently something else."""
    finished = run(*ZERO2, "--cpu", *arguments, timeout=120)
    assert finished.status != 0
    assert "step " not in finished.output


@FULL
def test_zero_stage_that_was_not_asked_for(arguments):
    launch = ("accelerate", "launch", "--use_deepspeed", "--zero_stage", "1", "--num_machines", "1")
    more = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
    finished = run(*launch, *more, *arguments, timeout=180)
    assert_refused(finished, "distributed.engine is zero2, but the launcher's zero_stage is 1")


@FULL
def test_a_deepspeed_file_of_another_stage(arguments, tmp_path):
    settings = json.loads((REPOSITORY / "launch" / "zero2.json").read_text())
    settings["zero_optimization"]["stage"] = 3
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    launch = (
        (REPOSITORY / "launch" / "zero2_cpu.yaml").read_text().replace("launch/zero2.json", f"{tmp_path}/zero3.json")
    )
    (tmp_path / "launch.yaml").write_text(launch)
    command = ("accelerate", "launch", "--config_file", str(tmp_path / "launch.yaml"), "--main_process_port", "0")
    finished = run(*command, *arguments, timeout=120)
    assert_refused(finished, f"zero_optimization.stage in {tmp_path}/zero3.json is 3, and only stage 2 is supported")


def test_the_error_of_a_wrong_configuration_is_one_line_without_traceback(arguments):
    finished = run("python", *arguments, "--adapter.targt_rank", "3", timeout=60)
    assert finished.status == 2
    assert finished.output == "error: unknown key adapter.targt_rank; did you mean adapter.target_rank?\n"
