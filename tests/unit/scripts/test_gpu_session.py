"""The script for a GPU that is there for minutes, rehearsed on a CPU with the tiny shape."""

import json
import os
import subprocess

import pytest
from support.repository import REPOSITORY

SCRIPT = "benchmarks/gpu_session.sh"


def session(output, **settings):
    environment = {**os.environ, "SHAPE": "8b-tiny", "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **settings}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment.pop("CI_FULL", None)  # the session runs all of tests/gpu
    return subprocess.run(
        ["bash", SCRIPT, str(output)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500
    ).stdout


@pytest.mark.full("benchmark")
@pytest.mark.timeout(1500)
def test_every_part_runs_and_its_figures_are_in_few_files(tmp_path):
    printed = session(tmp_path, ROUNDS="1", PATIENCE="10", MINUTES="40")
    table = (tmp_path / "table.txt").read_text()
    assert printed.endswith(table)
    parts = [line for line in table.splitlines() if line.startswith("== ")]
    assert parts
    # pytest's status 5 would be that no test was found; skipped ones are a success.
    assert all(": status 0, " in line for line in parts), table
    begun = "\n".join(parts)
    for name in (
        "step-1-rows",
        "step-4-rows",
        "make a base",
        "run, this project",
        "a base in shards",
        "memory",
        "estimate-4",
        "tests",
    ):
        assert f"== {name}" in begun
    assert "estimate, peak MiB" in table
    files = {path.name: path for path in tmp_path.iterdir()}
    assert set(files) == {"session.txt", "table.txt", "benchmarks.json", "profiles.txt", "runs.jsonl"}
    assert "aten::" in files["profiles.txt"].read_text()
    runs = [json.loads(line) for line in files["runs.jsonl"].read_text().splitlines()]
    assert runs[0]["what"] == "ours"
    assert runs[0]["median"] > 0
    assert runs[1]["what"] == "sharded base"
    assert runs[1]["same"]


def test_a_session_without_time_begins_no_part(tmp_path):
    printed = session(tmp_path, MINUTES="0")
    assert "== step-1-rows: no time left" in printed
    assert "status" not in printed
    assert not (tmp_path / "benchmarks.json").exists()
