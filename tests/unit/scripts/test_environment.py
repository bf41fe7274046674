"""The environment of the launch scripts: made once, and complete for what is asked for."""

import subprocess
from pathlib import Path

import pytest
from support.repository import REPOSITORY

PIP = """#!/bin/sh
case "$*" in *"pip install"*) echo "$*" >> "$PIP_CALLS" ;; esac
"""


@pytest.fixture
def ensure(tmp_path: Path):
    """``ensure(extras)``: what pip is asked to install by ``ensure_environment``, in a folder with a ready ``.venv``
    whose Python only writes down how it is called."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "constraints.txt").touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PIP)
    (programs / "python").chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    calls = tmp_path / "calls"

    def run(extras: str) -> list[str]:
        calls.write_text("")
        script = f'set -euo pipefail; source "{REPOSITORY}/launch/environment.sh"; ensure_environment "{extras}"'
        environment = {"PATH": "/usr/bin:/bin", "PIP_CALLS": str(calls), "PYTHON": str(programs / "python")}
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=20)
        return [line.split()[-1] for line in calls.read_text().splitlines()]

    return run


def test_what_developers_have_serves_users_and_is_installed_once(ensure):
    assert ensure("[dev]") == [".[dev]"]
    assert ensure("[dev]") == []
    assert ensure("") == []


def test_packages_of_a_part_of_the_full_lane_are_installed_where_the_fast_lane_ran_before(ensure):
    assert ensure("[dev]") == [".[dev]"]
    assert ensure("[dev,trl]") == [".[dev,trl]"]
    assert ensure("[dev,trl]") == []
