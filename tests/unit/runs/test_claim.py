"""One run at a time in a folder: who holds it, who is refused, and who takes over."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support.ranks import start_ranks

from dora_dist.runs import claim
from dora_dist.runs.claim import Claim, Holder, claims

BEAT = 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", BEAT)


def hold(rank, world_size, folder):
    """A process that holds the folder until it is killed, or writes down why it does not."""
    claim.BEAT_SECONDS = BEAT
    mine = Claim(Path(folder) / "run")
    try:
        mine.take()
    except ValueError as error:
        (Path(folder) / f"refused-{os.getpid()}").write_text(str(error))
        return
    (Path(folder) / f"held-{os.getpid()}").touch()
    time.sleep(60)


def started(folder, count=1):
    processes = start_ranks(hold, count, str(folder))
    wait_until(lambda: len(list(folder.glob("held-*"))) + len(list(folder.glob("refused-*"))) >= count)
    return processes


def wait_until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_claim_is_removed_at_the_end_with_a_folder_in_which_nothing_was_written(tmp_path):
    mine = Claim(tmp_path / "runs" / "x")
    mine.take()
    (path,) = claims(tmp_path / "runs" / "x")
    assert path.name == "claim-1.json"
    mine.release()
    mine.release()  # nothing is left to give back
    assert not (tmp_path / "runs" / "x").exists()

    again = Claim(tmp_path)
    again.take()
    again.release()
    assert tmp_path.is_dir(), "it was there before"


def test_a_second_run_is_refused_and_told_who_the_first_one_is(tmp_path, capfd):
    (holder,) = started(tmp_path)
    try:
        with pytest.raises(ValueError, match="in use by another run") as refusal:
            Claim(tmp_path / "run").take()
    finally:
        holder.kill()
        holder.join()
    for part in (f"process {holder.pid} on {os.uname().nodename}, since 20", "set output_dir to another folder"):
        assert part in str(refusal.value)
    assert "waiting 0.6 s for a sign of life" in capfd.readouterr().err


def test_the_claim_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path, capfd):
    (holder,) = started(tmp_path)
    holder.kill()
    holder.join()
    mine = Claim(tmp_path / "run")
    mine.take()
    assert [path.name for path in claims(tmp_path / "run")] == ["claim-2.json"]
    mine.release()
    assert claims(tmp_path / "run") == []
    said = capfd.readouterr().err
    assert f"over from process {holder.pid} on " in said
    assert said.strip().endswith("it has ended")
    assert said.count("\n") == 1


def test_a_process_that_is_stopped_misses_its_beats_and_ends_when_it_goes_on(tmp_path, capfd):
    (holder,) = started(tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    mine = Claim(tmp_path / "run")
    mine.take()
    assert "it has shown no sign of life for 3 beats" in capfd.readouterr().err
    os.kill(holder.pid, signal.SIGCONT)
    holder.join(30)
    assert holder.exitcode == 1
    time.sleep(2 * BEAT)
    assert [path.name for path in claims(tmp_path / "run")] == ["claim-2.json"]
    mine.release()


def test_of_several_that_start_together_one_holds_the_folder(tmp_path):
    processes = started(tmp_path, count=4)
    try:
        assert len(list(tmp_path.glob("held-*"))) == 1
        assert len(list(tmp_path.glob("refused-*"))) == 3
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_of_several_that_find_a_dead_claim_one_takes_over(tmp_path):
    (dead,) = started(tmp_path)
    dead.kill()
    dead.join()
    for mark in tmp_path.glob("held-*"):
        mark.unlink()
    test_of_several_that_start_together_one_holds_the_folder(tmp_path)


def test_who_waits_gets_the_folder_of_a_run_that_ends_meanwhile(tmp_path, capfd):
    theirs = tmp_path / "claim-3.json"
    theirs.write_text("{}")
    ending = threading.Timer(1.5 * BEAT, theirs.unlink)
    ending.start()
    mine = Claim(tmp_path)
    mine.take()
    ending.join()
    assert len(claims(tmp_path)) == 1
    mine.release()
    assert "taking" not in capfd.readouterr().err


def test_a_claim_that_nobody_can_read_is_watched_like_others(tmp_path, capfd):
    (tmp_path / "claim-7.json").touch()
    mine = Claim(tmp_path)
    mine.take()
    assert [path.name for path in claims(tmp_path)] == ["claim-8.json"]
    mine.release()
    assert "from another run: it has shown no sign of life" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run cannot be written to: "):
        Claim(tmp_path / "file" / "run").take()


HERE = Holder.here({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"restart": 0}, "Slurm has requeued job 7 since then"),
        ({"restart": 0, "job": "8"}, None),
        ({"boot": "another"}, f"{HERE.host} was booted since then"),
        ({"boot": "another", "host": "elsewhere"}, None),
        ({"born": "1"}, "it has ended"),
        ({"born": "1", "host": "elsewhere"}, None),
        ({"born": "1", "pids": "those of a container"}, None),
        ({"boot": None, "born": None}, None),
    ],
)
def test_what_shows_at_once_that_a_holder_is_gone(changes, reason):
    assert dataclasses.replace(HERE, **changes).end_seen_by(HERE) == reason


def test_a_folder_is_held_while_its_claim_is_kept_up_by_a_process_that_lives(tmp_path):
    assert claim.held_since(tmp_path) is None
    mine = Claim(tmp_path)
    before = int(time.time())
    mine.take()
    assert before <= claim.held_since(tmp_path) <= time.time()
    mine.release()
    assert claim.held_since(tmp_path) is None

    (process,) = started(tmp_path)
    assert claim.held_since(tmp_path / "run") is not None
    process.kill()
    process.join()
    assert claim.held_since(tmp_path / "run") is None, "the process has ended"

    elsewhere = dataclasses.replace(HERE, host="another")
    path = tmp_path / "claim-7.json"
    path.write_text(json.dumps({**dataclasses.asdict(elsewhere), "beat": "1"}))
    assert claim.held_since(tmp_path) is not None
    os.utime(path, (time.time() - 10 * BEAT,) * 2)
    assert claim.held_since(tmp_path) is None, "its beats are missing"
    path.write_text("{")
    assert claim.held_since(tmp_path) is None
