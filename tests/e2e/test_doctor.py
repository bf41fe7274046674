"""The doctor as a command: its report, its exit status, and that nothing is left of it."""

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import ZERO2, run
from support.forked_run import free_port
from support.ranks import rank_environment, start_ranks, wait_for_ranks
from support.tiny_run import write_config

NODE = platform.node()

SECTIONS = ("Software", "Environment", "Devices", "Checkpoint folder", "All-reduce")
WIDTH = 110


CLONE_NEWUTS = 0x04000000
"""unshare(2): a host name of its own. Python has it from 3.12."""


def doctor_rank(rank, started, arguments_of, port, log, world_size=None):
    """One rank of a launched doctor, with arguments, output and, where that is allowed, a host name of its own.

    By default, all ranks of its world are started.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background was started ignoring it
    if ctypes.CDLL(None).unshare(CLONE_NEWUTS) == 0:
        socket.sethostname(f"node{rank}")
    rank_environment(rank, world_size or started, MASTER_PORT=str(port))
    with open(f"{log}-{rank}", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.__stdout__ = sys.stdout
    from dora_dist.console.command import run_command
    from dora_dist.doctor.__main__ import main

    run_command(lambda: main(arguments_of[rank]))


def forked(log: Path, *arguments_of: list[str], timeout: float = 60):
    """Run a doctor of as many ranks as there are argument lists; statuses and outputs, by rank."""
    processes = start_ranks(doctor_rank, len(arguments_of), list(arguments_of), free_port(), str(log))
    wait_for_ranks(processes, timeout)
    outputs = [Path(f"{log}-{rank}").read_text() for rank in range(len(arguments_of))]
    return [process.exitcode for process in processes], outputs


def assert_report(text):
    """All sections are there, and no traceback."""
    assert all(any(line.startswith(title) for line in text.splitlines()) for title in SECTIONS), text
    assert "Traceback" not in text


def unwrapped(text):
    """On one line: where lines end depends on the length of folders' names."""
    return " ".join(text.split())


@pytest.mark.full("install")
def test_alone_on_a_machine(tmp_path):
    finished = run("python", "-m", "dora_dist.doctor", "--output", str(tmp_path / "new" / "run"), timeout=60)
    assert_report(finished.output)
    assert "1 node, 1 rank" in finished.output
    assert "nf4 layer: right" in finished.output
    # This machine may really have a fault, which is then told.
    assert finished.status == (0 if finished.output.endswith("nothing wrong found\n") else 1)
    assert os.listdir(tmp_path) == []
    assert max(map(len, finished.output.splitlines())) <= WIDTH


@pytest.mark.full("install")
def test_two_ranks_under_the_launcher_of_zero_with_a_configuration(tmp_path):
    config = write_config(tmp_path)
    before = sorted(os.listdir(tmp_path))
    finished = run(*ZERO2, "-m", "dora_dist.doctor", "--config", str(config), timeout=90)
    assert_report(finished.output)
    assert "1 node, 2 ranks" in finished.output
    assert f"Checkpoint folder {tmp_path / 'run'}" in finished.output
    assert "a checkpoint of this run takes about" in finished.output
    assert "All-reduce over 2 ranks, gloo" in finished.output
    assert finished.output.count("the sum of known values is right") == 1
    assert finished.status == (0 if "nothing wrong found\n" in finished.output else 1)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_rank_with_another_folder_is_named(tmp_path):
    folders = [str(tmp_path / "shared"), str(tmp_path / "own")]
    statuses, outputs = forked(tmp_path / "log", *(["--output", folder] for folder in folders))
    assert statuses == [1, 1]
    assert_report(outputs[0])
    named = "rank 1 on node1: " if "2 nodes, 2 ranks" in outputs[0] else "rank 1 on "
    assert named in outputs[0]
    assert "a file that rank 0 has just written is not there" in unwrapped(outputs[0])
    assert "Software" not in outputs[1]
    assert sorted(os.listdir(tmp_path)) == ["log-0", "log-1"]


def test_a_folder_that_cannot_be_made_is_a_problem_and_the_rest_is_still_looked_at(tmp_path):
    (tmp_path / "file").touch()
    statuses, outputs = forked(tmp_path / "log", *(["--output", str(tmp_path / "file" / "run")],) * 2)
    assert statuses == [1, 1]
    assert_report(outputs[0])
    assert "Not a directory" in unwrapped(outputs[0])
    assert "the sum of known values is right" in outputs[0]


def test_a_configuration_that_one_rank_cannot_read_names_the_rank(tmp_path):
    config = str(write_config(tmp_path))
    statuses, outputs = forked(tmp_path / "log", ["--config", config], ["--config", str(tmp_path / "missing.yaml")])
    assert statuses == [1, 1]
    assert (
        f"reading the configuration failed on 1 of 2 ranks: rank 1 ({NODE}): ValueError: there is no file" in outputs[0]
    )
    assert "error" not in outputs[1], "what all ranks of a node find is said once"


def test_a_rank_that_does_not_come_ends_the_wait(tmp_path):
    log = tmp_path / "log"
    (process,) = start_ranks(doctor_rank, 1, [["--timeout", "1"]], free_port(), str(log), 2)
    wait_for_ranks([process], 60)
    output = Path(f"{log}-0").read_text()
    assert process.exitcode == 1
    assert "[rank 0] error: rank 1 of 2 (connected: rank 0 (" in output
    assert "Traceback" not in output


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_is_small_or_full(small_disk, full):
    if full:
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filler").write_bytes(bytes(3 * 2**20))
    before = os.listdir(small_disk)
    statuses, outputs = forked(small_disk.parent / "log", ["--output", str(small_disk)])
    assert statuses == [1]
    assert ("No space left on device" if full else "rule: at least 1 GiB") in unwrapped(outputs[0])
    assert "tmpfs" in outputs[0]
    assert os.listdir(small_disk) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(tmp_path, sent):
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    (process,) = start_ranks(doctor_rank, 1, [["--output", str(folder / "new")]], free_port(), str(log))
    end = time.monotonic() + 60
    while not list(folder.glob("new/*-speed")) and process.is_alive():
        assert time.monotonic() < end, "it has not begun to write"
        time.sleep(0.005)
    os.kill(process.pid, sent)
    wait_for_ranks([process], 60)
    output = Path(f"{log}-0").read_text()
    assert process.exitcode == 130, output
    assert output.endswith("interrupted\n")
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outputt", "x"], "error: --outputt is no option of the doctor"),
        (["--timeout", "0"], "error: --timeout is 0, but must be positive"),
        (["--config", "missing.yaml"], "error: there is no file missing.yaml"),
    ],
)
def test_a_command_that_cannot_be_understood_ends_with_2(tmp_path, arguments, message):
    statuses, outputs = forked(tmp_path / "log", arguments)
    assert statuses == [2]
    assert message in outputs[0]
