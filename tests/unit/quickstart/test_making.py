"""Making the quickstart's folder: what is said meanwhile, and what is left when it is interrupted."""

import os
import re
import signal
import time
from pathlib import Path

from support.ranks import start_ranks, wait_for_ranks

from dora_dist.quickstart import backbone, folder
from dora_dist.quickstart.backbone import BackboneSettings, build_model, pretrain
from dora_dist.quickstart.folder import ensure_quickstart

TINY = BackboneSettings(
    vocabulary=400, hidden=64, intermediate=64, layers=1, heads=2, batch=2, steps=10, warmup_steps=2
)


def test_a_line_says_how_long_the_pretraining_still_takes(monkeypatch, capsys):
    monkeypatch.setattr(backbone, "PROGRESS_SECONDS", 0.0)
    pretrain(build_model(TINY, TINY.vocabulary, seed=0), [[1, 5, 6, 2]] * TINY.batch * TINY.steps, TINY)
    lines = capsys.readouterr().err.splitlines()
    form = r"backbone: step +(\d+)/10  loss \d+\.\d{3}  [\d,]+ tokens/s  (\d+\.\d) min left"
    found = [re.fullmatch(form, line).groups() for line in lines]
    assert [int(step) for step, _ in found] == list(range(1, 11))
    assert found[-1][1] == "0.0"


def making(_: int, __: int, output: str, log: str) -> None:
    """A start of the quickstart, as the command makes it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(CUDA_VISIBLE_DEVICES="-1")
    from dora_dist.console.command import run_command
    from dora_dist.quickstart.__main__ import main

    run_command(lambda: main(["--output", output, "--prepare-only"]))


def started(tmp_path: Path):
    """Such a start that is at work, and its scratch folder."""
    before = set(tmp_path.glob(".out.partial-*"))
    (process,) = start_ranks(making, 1, str(tmp_path / "out"), str(tmp_path / "log"))
    end = time.monotonic() + 60
    while not (new := [path for path in set(tmp_path.glob(".out.partial-*")) - before if any(path.iterdir())]):
        assert process.is_alive(), (tmp_path / "log").read_text()
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.01)
    return process, new[0]


def test_sigterm_leaves_nothing_and_a_later_start_removes_what_a_kill_has_left(tmp_path):
    killed, left = started(tmp_path)
    folder._remove_if_left(left)
    assert left.is_dir(), "its process is alive"
    killed.kill()
    killed.join()
    stopped, _ = started(tmp_path)
    assert not left.exists()
    assert f"removing {left}, which a start that was killed has left" in (tmp_path / "log").read_text()
    os.kill(stopped.pid, signal.SIGTERM)
    wait_for_ranks([stopped], timeout=60)
    assert stopped.exitcode == 130
    assert (tmp_path / "log").read_text().splitlines()[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["log"], "nothing is left"


def test_a_model_of_other_settings_is_made_again_and_that_is_said(tmp_path, capsys):
    output = tmp_path / "out"
    for name in ("run-1", "run-2"):
        (output / name).mkdir(parents=True)
    (output / folder.STAMP_NAME).write_text("{}")
    former = signal.getsignal(signal.SIGTERM)
    ensure_quickstart(output, settings=TINY)
    said = capsys.readouterr().err
    assert f"quickstart: {output} is from other settings: making it again (the 2 runs in it, of the old model," in said
    ensure_quickstart(output, settings=TINY)
    said = capsys.readouterr()
    assert (said.err, said.out) == ("", f"quickstart: {output} is up to date\n")
    assert signal.getsignal(signal.SIGTERM) is former
