"""How a command ends: the exit status and what the user reads."""

import subprocess
import sys

import pytest
from support.repository import REPOSITORY

from dora_dist.console.command import capture
from dora_dist.console.files import digest_sources
from dora_dist.console.provenance import environment
from dora_dist.data.encoding import chat
from dora_dist.doctor.node import node_facts


def ended(work: str) -> subprocess.CompletedProcess[str]:
    """A command whose main function is ``work``."""
    program = f"from dora_dist.console.command import run_command\ndef main():\n    {work}\nrun_command(main)"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "work",
    [
        "from dora_dist.config.checks import require; require(False, 'adapter.alpha', 0, 'be positive')",
        "from dora_dist.method.schedule import BudgetSchedule; BudgetSchedule(1, 1, 2, 1)",
        "from dora_dist.estimate import main; main(['nowhere.yaml'])",
    ],
    ids=["room", "method", "command"],
)
def test_a_users_error_is_one_message_whichever_room_raises_it(work):
    done = ended(work)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_error_of_a_library_keeps_its_traceback():
    done = ended("import json; json.loads('{')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Expecting property name")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        ("RuntimeError('no disk\\nmore')", 1, "no disk False"),
        ("PreemptedError('preempted at step 3')", 75, "preempted at step 3 True"),
        ("KeyboardInterrupt", 130, "interrupted True"),
    ],
)
def test_what_is_to_be_done_last_is_done_after_the_error_and_cannot_hide_it(tmp_path, error, status, told):
    work = f"""from dora_dist.console.command import do_last
    from dora_dist.console.errors import PreemptedError
    def act(message, stopped):
        sys.stderr.write('last\\n')
        open({str(tmp_path / "told")!r}, 'w').write(f'{{message}} {{stopped}}')
        1 / 0
    import sys
    do_last(act)
    raise {error}"""
    done = ended(work)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "told").read_text() == told
    lines = done.stderr.splitlines()
    assert lines[-1] == "last"
    assert told.split()[0] in "".join(lines[-3:-1])
    assert "ZeroDivisionError" not in done.stderr


def test_what_is_done_last_has_no_more_than_its_time():
    work = """import time; from dora_dist.console import command
    command.LAST_ACT_SECONDS = 0.1
    command.do_last(lambda message, stopped: time.sleep(600))
    raise ValueError('wrong')"""
    assert ended(work).returncode == 1  # within the time that a test has


def test_a_captured_error_is_raised_where_the_result_is_asked_for():
    assert capture(int, "7").result() == 7
    captured = capture(int, "seven")
    with pytest.raises(ValueError, match="seven"):
        captured.result()


def test_what_is_read_beside_the_sources_is_found_from_its_room():
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    expected = commit.stdout.strip() if commit.returncode == 0 else None  # an unpacked archive
    assert environment(["torch"])["commit"] == expected
    assert node_facts({})["source"] == digest_sources(REPOSITORY / "dora_dist")[:8]
    assert {path.stem for path in chat.BUNDLED.glob("*.jinja")} >= {"chatml", "llama3", "plain"}
