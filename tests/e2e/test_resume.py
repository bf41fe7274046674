"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

import pytest
from support.commands import ZERO2, run, train
from support.forked_run import log_of, start_run
from support.ranks import wait_for_ranks
from support.same_run import assert_same_run, stopped_at


@pytest.mark.parametrize("step", [3, 5, 9], ids=["before the first prune", "between prunes", "after the last prune"])
def test_resume_is_bit_for_bit(step, reference, tmp_path):
    resumed = stopped_at(step, reference.run, tmp_path)
    if step == 5:
        output = train(reference.config, "--output_dir", str(resumed)).output
    else:
        wait_for_ranks(start_run(reference.config, resumed, tmp_path / "log"), timeout=120)
        output = log_of(tmp_path / "log")
    assert f"resuming from {resumed}/checkpoint-{step}" in output
    assert_same_run(reference.run, resumed)


def test_another_method_is_not_continued(reference, tmp_path):
    resumed = stopped_at(5, reference.run, tmp_path)
    finished = run(
        *ZERO2,
        *("-m", "dora_dist.train", "--config", str(reference.config), "--output_dir", str(resumed)),
        *("--pruning.smoothing", "0.5"),
    )
    assert finished.status != 0
    assert "pruning.smoothing was 0.9 and is now 0.5" in finished.output
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>' not in finished.output


def test_a_finished_run_is_left_alone(reference):
    before = (reference.run / "metrics.jsonl").read_text()
    finished = train(reference.config)
    assert f"{reference.run} holds a finished run" in finished.output
    assert (reference.run / "metrics.jsonl").read_text() == before
