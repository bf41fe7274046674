"""The speed of a run, from its records."""

import json

import pytest
from support.repository import REPOSITORY

from dora_dist.runs.speed import LATEST_LINES, Speed, TrainingTime, find_speed

SOURCES = [
    {"per_epoch": 100, "examples": 50, "tokens": 500},  # twice a pass
    {"per_epoch": 10, "examples": 40, "tokens": 4000},  # a quarter of it
]
TOKENS_PER_PASS = 2000


def write_run(folder, lines, sources=SOURCES, processes=1):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"data": {"train": sources}, "processes": processes}))
    return folder


def logged(steps, seconds, per_pass=10):
    """Lines of training after these steps, of which so many are a pass over the data."""
    return [
        {"step": step, "loss": 1.0, "epoch": step / per_pass, "seconds_per_step": time}
        for step, time in zip(steps, seconds, strict=True)
    ]


def test_all_tokens_over_all_seconds_whatever_the_number_of_steps_of_a_line(tmp_path):
    lines = logged((2, 10, 11), (4.0, 1.0, 6.0))
    lines.insert(1, {"step": 5, "eval_loss": 2.0, "epoch": 0.5})
    lines.insert(2, {"step": 6, "skipped": "rank 0: loss nan"})
    # 2 x 4 + 8 x 1 + 1 x 6 s for 11 of 10 steps a pass.
    speed = find_speed(write_run(tmp_path / "run", lines), None)
    assert speed == Speed(pytest.approx(1.1 * TOKENS_PER_PASS / 22), f"seen in {tmp_path}/run, on 1 process")


def test_only_the_latest_lines_count(tmp_path):
    steps = range(1, LATEST_LINES + 21)
    lines = logged(steps, [100.0] * 20 + [0.5] * LATEST_LINES)
    assert find_speed(write_run(tmp_path, lines, processes=4), None) == Speed(
        pytest.approx(TOKENS_PER_PASS / 10 / 0.5), f"seen in {tmp_path}, on 4 processes"
    )


def test_where_nothing_is_known_nothing_is_said(tmp_path):
    assert find_speed(tmp_path / "nowhere", None) is None
    assert find_speed(write_run(tmp_path / "begun", [{"step": 0, "eval_loss": 2.0}]), None) is None
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    assert find_speed(tmp_path / "begun", None) is None


def test_what_is_given_counts(tmp_path):
    run = write_run(tmp_path, logged((2,), (4.0,)))
    assert find_speed(run, 7000.0) == Speed(7000.0, "--tokens-per-second")


def test_a_run_of_an_earlier_format_shows_its_speed():
    run = REPOSITORY / "tests" / "earlier_versions" / "73e868c" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(2 * line["seconds_per_step"] for line in lines if "loss" in line)
    # 12 steps of 4 of 50 examples of 850 tokens.
    assert find_speed(run, None).tokens_per_second == pytest.approx(12 * 4 / 50 * 850 / seconds)


def test_the_training_time_is_that_of_all_sessions():
    """The second one goes on from step 2, and its first line is of one step."""
    lines = [
        {"step": 2, "seconds_per_step": 1.0, "tokens_per_second": 10.0},
        {"step": 2, "eval_loss": 1.0},
        {"step": 2, "session_seconds": 9.0, "session_tokens": 900},
        {"step": 3, "seconds_per_step": 5.0, "tokens_per_second": 2.0},
        {"step": 6, "seconds_per_step": 1.0, "tokens_per_second": 10.0},
        {"step": 6, "session_seconds": 8.0, "session_tokens": 40},
    ]
    time = TrainingTime()
    for line in lines:
        time.add(line)
    assert (time.seconds, time.tokens) == (2 + 5 + 3, 20 + 10 + 30)
    time.add({"step": 7, "seconds_per_step": 1.0})  # as earlier versions and PEFT's methods have it
    assert (time.seconds, time.tokens) == (11, None)
