"""SIGTERM and SIGUSR1: one decision, a complete checkpoint, and a run that goes on as if nothing had been.

Two real ranks under ZeRO-2 run the entry point's ``main`` (see ``forked_run.py``). Most of them signal themselves, at
an exact place of the program.
"""

import contextlib
import os
import signal
import time

import pytest
from support.commands import steps_of
from support.forked_run import RANKS, log_of, run_to_the_end, start_run, train_rank
from support.ranks import wait_for_ranks
from support.same_run import assert_same_run
from support.tiny_run import write_config

from dora_dist.console.errors import PREEMPTED
from dora_dist.runs import checkpoint

LAST = 20


def signalled_rank(rank, world_size, arguments, port, log, signals):
    """A rank that signals itself.

    Args:
        signals: of every rank: place -> names of the signals, where a place is ``load``, the number of a step, or
            ``save N`` for the moments before and after the writing of a checkpoint.
    """
    from dora_dist.setup import build
    from dora_dist.training.trainer import DynamicLoraTrainer as Trainer

    mine = signals.get(rank, {})

    def send(place):
        for name in mine.get(place, []):
            os.kill(os.getpid(), signal.Signals[name])

    load_model, training_step, save = build.load_model, Trainer.training_step, Trainer._save_checkpoint

    def loading(*args):
        send("load")
        return load_model(*args)

    def stepping(trainer, *args):
        send(str(trainer.state.global_step + 1))
        return training_step(trainer, *args)

    def saving(trainer, *args):
        step = trainer.state.global_step
        os.write(2, f"saving {step}\n".encode())
        send(f"save {step}")
        save(trainer, *args)
        send(f"save {step}")

    build.load_model, Trainer.training_step, Trainer._save_checkpoint = loading, stepping, saving
    train_rank(rank, world_size, arguments, port, log)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone: dropout, an evaluation every 5 steps, one checkpoint on the way."""
    folder = tmp_path_factory.mktemp("preemption")
    config = write_config(
        folder,
        adapter={"dropout": 0.1},
        training={"max_steps": LAST, "save_steps": 15, "eval_strategy": "steps", "eval_steps": 5},
    )
    run_to_the_end(config, folder / "run", folder / "log")
    return config


def statuses(processes):
    wait_for_ranks(processes, timeout=60)
    return [process.exitcode for process in processes]


@pytest.mark.full("faults")
def test_signals_at_every_stage_end_in_the_run_that_was_left_alone(whole, tmp_path):
    run = tmp_path / "run"
    burst = ["SIGTERM", "SIGUSR1", "SIGTERM"]
    stages = [
        ({1: {"load": ["SIGTERM"]}}, None),
        ({1: {"4": ["SIGTERM"]}}, 4),
        ({0: {"10": ["SIGUSR1"]}}, 10),  # where an evaluation is due
        ({rank: {"15": burst, "save 15": burst} for rank in range(RANKS)}, 15),  # where a checkpoint is due
        ({0: {str(LAST): ["SIGTERM"]}}, LAST),  # the last step: there is nothing to stop
    ]
    for number, (signals, step) in enumerate(stages):
        log = tmp_path / f"log-{number}"
        found = statuses(start_run(whole, run, log, target=signalled_rank, more=(signals,)))
        text = log_of(log)
        assert found == ([0, 0] if step == LAST else [PREEMPTED, PREEMPTED]), text
        assert "Traceback" not in text
        assert "error:" not in text
        assert all(f"[rank {rank}] received " in text for rank in signals)
        if step is None:
            assert "preempted before training: nothing to save; start the same command again" in text
            assert not list(run.glob("*"))
            continue
        assert text.count("saving ") == RANKS
        assert checkpoint.flaw_of(run / f"checkpoint-{step}") is None
        assert checkpoint.checkpoints(run)[-1].name == f"checkpoint-{step}"
        if step != LAST:
            assert text.count(f"preempted at step {step}: checkpoint-{step} is complete") == 1
            assert not (run / "adapter").exists()
    assert_same_run(whole.parent / "run", run)


@pytest.mark.full("faults")
def test_signals_from_outside_again_and_again(whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    processes = start_run(whole, run, log)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not steps_of(run):
        assert time.monotonic() < end, log_of(log)
        time.sleep(0.01)
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < end, log_of(log)
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it ended since
                    os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    assert statuses(processes) == [PREEMPTED, PREEMPTED], log_of(log)
    assert [checkpoint.flaw_of(path) for path in checkpoint.checkpoints(run)] == [None]
    assert statuses(start_run(whole, run, log)) == [0, 0], log_of(log)
    assert_same_run(whole.parent / "run", run)


@pytest.mark.full("faults")
def test_a_signal_at_the_step_whose_evaluation_ends_the_run_early_changes_nothing(tmp_path):
    """That evaluation is left to the resumed run, which then has to stop before its first step."""
    sections = {
        "evaluation": {"exact_match": True, "max_new_tokens": 2, "keep_best": "exact_match", "early_stopping": 2},
        "training": {"eval_strategy": "steps", "eval_steps": 1},
    }
    config = write_config(tmp_path, **sections)
    run_to_the_end(config, tmp_path / "run", tmp_path / "log")
    run, log = tmp_path / "signalled", tmp_path / "log-2"
    signals = {1: {"8": ["SIGTERM"]}}
    assert statuses(start_run(config, run, log, target=signalled_rank, more=(signals,))) == [PREEMPTED] * RANKS
    text = run_to_the_end(config, run, tmp_path / "log-3")
    assert "the run ends at step 8 of 12" in text
    assert_same_run(tmp_path / "run", run)
