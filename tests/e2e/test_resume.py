"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

import pytest
from support.commands import train
from support.forked_run import run_that_fails, run_to_the_end
from support.same_run import assert_same_run, stopped_at
from support.tiny_run import write_rows


@pytest.mark.parametrize("step", [3, 5, 9], ids=["before the first prune", "between prunes", "after the last prune"])
def test_resume_is_bit_for_bit(step, reference, tmp_path):
    resumed = stopped_at(step, reference.run, tmp_path)
    if step == 5:
        output = train(reference.config, "--output_dir", str(resumed)).output
    else:
        output = run_to_the_end(reference.config, resumed, tmp_path / "log")
    assert f"resuming from {resumed}/checkpoint-{step}" in output
    assert_same_run(reference.run, resumed)


def test_another_method_is_not_continued(reference, tmp_path):
    resumed = stopped_at(5, reference.run, tmp_path)
    status, text = run_that_fails(reference.config, resumed, tmp_path / "log", "--pruning.smoothing", "0.5")
    assert status == 2
    assert "pruning.smoothing was 0.9 and is now 0.5" in text
    assert "Traceback" not in text


def test_figures_before_and_after_are_of_the_same_held_out_examples(reference, tmp_path):
    resumed = stopped_at(5, reference.run, tmp_path)
    other = write_rows(tmp_path / "other.jsonl", 7, seed=3)
    options = ("--data.eval", str(other), "--evaluation.max_examples", "3")
    status, text = run_that_fails(reference.config, resumed, tmp_path / "log", *options)
    assert status == 2
    assert "data.eval: examples of eval was '10, " in text
    assert "data.eval: examples of other was None and is now '7, " in text
    assert "evaluation.max_examples was None and is now 3. Restore them to continue that run, or choose" in text
    assert "Traceback" not in text


def test_a_finished_run_is_left_alone(reference, tmp_path):
    before = (reference.run / "metrics.jsonl").read_text()
    output = run_to_the_end(reference.config, reference.run, tmp_path / "log")
    assert f"{reference.run} holds a finished run" in output
    assert (reference.run / "metrics.jsonl").read_text() == before
