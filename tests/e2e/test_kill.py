"""SIGKILL at random moments of a save: the next run goes on from the newest complete checkpoint by itself.

Two real ranks under ZeRO-2 run the entry point's ``main`` (see ``forked_run.py``), so that a dozen kills fit into a
test.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.forked_run import log_of, start_run
from support.ranks import wait_for_ranks
from support.same_run import assert_same_run
from support.tiny_run import write_config

from dora_dist.runs import checkpoint

pytestmark = pytest.mark.full("faults")

KILLS = 10


def test_killed_during_saves_it_ends_like_a_run_that_was_left_alone(tmp_path):
    config = write_config(tmp_path, adapter={"dropout": 0.1}, training={"max_steps": 30}, checkpoint={"keep_last": 2})
    wait_for_ranks(start_run(config, tmp_path / "whole", tmp_path / "whole.log"), timeout=120)
    assert (tmp_path / "whole" / "adapter").is_dir(), (tmp_path / "whole.log-0").read_text()

    source, output, log = random.Random(7), tmp_path / "run", tmp_path / "run.log"
    kills = flawed = 0
    while kills < KILLS:
        processes = start_run(config, output, log)
        killed = kill_during_save(processes, output, source)
        wait_for_ranks(processes, timeout=60)
        assert killed, f"the run ended after {kills} kills:\n{log_of(log)}"
        kills += 1
        flawed += any(checkpoint.flaw_of(path) for path in checkpoint.checkpoints(output))
    assert flawed, "no kill hit a save in progress: the test proves nothing"

    wait_for_ranks(start_run(config, output, log), timeout=120)
    assert (output / "adapter").is_dir(), log_of(log)
    assert "resuming from" in log_of(log)
    assert_same_run(tmp_path / "whole", output)


def kill_during_save(processes, output: Path, source: random.Random) -> bool:
    """SIGKILL one rank or all, a random moment after a new checkpoint folder has appeared; False if the run ended."""
    wait_until = {path.name for path in checkpoint.checkpoints(output)}
    countdown = source.randint(1, 2)
    while any(process.is_alive() for process in processes):
        new = {path.name for path in checkpoint.checkpoints(output)} - wait_until
        if len(new) >= countdown:
            time.sleep(source.uniform(0, 0.25))
            victims = processes if source.random() < 0.5 else [source.choice(processes)]
            for process in victims:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)
            for process in processes:  # as the launcher does when one process has gone
                process.kill()
            return True
        time.sleep(0.002)
    return False
