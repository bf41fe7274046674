"""Every part of a run that can take long has a phase, which is said while it lasts (unit/console/test_phases.py)."""

import re

from support.forked_run import log_of, start_run
from support.ranks import wait_for_ranks
from support.telling_rank import BEGINS, telling_rank
from support.tiny_run import write_config

WAITS = r" \(done on this rank, which waits for the others\)"
IN_ORDER = [
    "starting",
    "waiting for all ranks to start",
    "preparing data",
    "joining the process group",
    "looking into .*run",
    "preparing data and settings",
    "loading the model",
    f"loading the model{WAITS}",
    "comparing settings, data or base model",
    "evaluation",
    f"evaluation{WAITS}",
    "starting the engine",
    "comparing the adapter at the start",
    "forward, backward and update of step 1",
    "comparing the adapter before the checkpoint of step 6",
    "writing .*checkpoint-6",
    f"writing .*checkpoint-6{WAITS}",
    "sealing .*checkpoint-6",
    "forward, backward and update of step 12",
    "comparing the adapter at the end of the run",
    "evaluation",
    "writing the results into .*run",
    "the end of the run",
]


def test_a_run_is_in_a_phase_of_its_own_wherever_it_can_take_long(tmp_path):
    config = write_config(tmp_path, evaluation={"before": True}, training={"save_steps": 6})
    processes = start_run(config, tmp_path / "run", tmp_path / "log", target=telling_rank, more=("zero2",))
    wait_for_ranks(processes, timeout=120)
    text = log_of(tmp_path / "log", 1)
    assert [process.exitcode for process in processes] == [0, 0], text
    phases = iter([line.removeprefix(BEGINS) for line in text.splitlines() if line.startswith(BEGINS)])
    for pattern in IN_ORDER:
        assert any(re.fullmatch(pattern, phase) for phase in phases), f"{pattern} does not come in its turn in:\n{text}"
