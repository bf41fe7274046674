"""The notice of a preemption, in this process and in ones made for it."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.repository import REPOSITORY
from transformers import TrainerControl

from dora_dist.console.errors import PREEMPTED, PreemptedError
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.preemption import SIGNALS, PreemptionNotice
from dora_dist.training.trainer import DynamicLoraTrainer


@pytest.fixture(autouse=True)
def handlers():
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield former
    for number, handler in former.items():
        signal.signal(number, handler)


def current():
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_said_once(number, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with PreemptionNotice() as notice:
        assert notice.received is None
        os.kill(os.getpid(), number)
        assert notice.received == number.name
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"[rank 3] received {number.name}: stopping at the end of this step")


def test_later_signals_change_nothing_which_is_said_once(capfd):
    with PreemptionNotice() as notice:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert notice.received == "SIGUSR1"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1] == "received SIGTERM too: it changes nothing, SIGUSR1 is being served"


@pytest.mark.parametrize("error", [None, ValueError], ids=["normally", "with an error"])
def test_the_former_handlers_are_back_when_it_is_left(error, handlers):
    try:
        with PreemptionNotice():
            assert current() != handlers
            if error is not None:
                raise error
    except ValueError:
        pass
    assert current() == handlers


def test_a_process_that_ends_preempted_ignores_further_signals():
    with pytest.raises(PreemptedError):
        with PreemptionNotice():
            raise PreemptedError("step 3")
    assert set(current().values()) == {signal.SIG_IGN}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, 0)])
def test_forked_processes_end_by_sigterm_and_ignore_sigusr1(number, status):
    """multiprocessing's pools and the DataLoader end their workers by SIGTERM, and wait for them."""
    with PreemptionNotice() as notice:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        _, found = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(found) == status
        assert notice.received is None
    child = os.fork()  # a notice that has been left touches no process
    if child == 0:
        os._exit(int(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_exit_status_tells_preemption_from_failure(rank):
    program = (
        "from dora_dist.console.command import *\ndef main(): raise PreemptedError('at step 3')\nrun_command(main)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == PREEMPTED == os.EX_TEMPFAIL
    assert (finished.stdout, finished.stderr) == ("", "at step 3\n" if rank == "0" else "")


@pytest.mark.parametrize("step", [3, 12], ids=["before the last step", "at the last step"])
def test_training_stops_with_the_losses_so_far_logged_and_an_evaluation_put_off(step):
    trainer = SimpleNamespace(
        parts=SimpleNamespace(
            agreement=Agreement(),
            notice=SimpleNamespace(received="SIGTERM"),
            controller=SimpleNamespace(failure=None),
        ),
        state=SimpleNamespace(global_step=step, max_steps=12),
        preempted=False,
    )
    control = TrainerControl(should_evaluate=True)
    DynamicLoraTrainer.stop_early(trainer, control)
    stopped = step < 12
    assert trainer.preempted is stopped
    assert (control.should_log, control.should_save, control.should_training_stop) == (stopped,) * 3
    assert control.should_evaluate is not stopped
