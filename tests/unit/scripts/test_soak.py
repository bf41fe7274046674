"""How the soak judges: memory, steps taken again, and what counts as a failure."""

import json
import random

import pytest
from soak import draw_plan, has_stepped, resumed_step
from soak_judge import MIB, differences, distances, drift, growth, judge, summarize, too_far
from soak_session import Sample, last_step


def samples(slope, rank=0, settle=0.0):
    """Of 100 steps each; ``slope`` in MiB per 1000 steps, and a jump in the first half."""
    return [
        Sample(rank, number, 100 * number, int(MIB * (500 + slope * number / 10 + (settle if number > 5 else 0))))
        for number in range(40)
    ]


def test_growth_is_that_of_the_worst_rank_once_memory_has_settled():
    assert growth([*samples(0.0), *samples(3.0, rank=1, settle=80)]) == pytest.approx(3.0, abs=0.01)
    assert growth(samples(3.0)[:15]) is None, "too short to tell"
    after = [Sample(0, 40, 3900, 900 * MIB)] * 5
    assert growth([*samples(1.0), *after]) == pytest.approx(1.0, abs=0.01), "memory after the last step is not training"


def test_drift_compares_late_sessions_with_early_ones():
    assert drift([100, 102, 300, 110, 112, 114]) == pytest.approx(113 / 101 - 1, abs=1e-3)
    assert drift([100, 102]) is None


def test_a_log_says_where_a_session_began(tmp_path):
    log = tmp_path / "log"
    log.write_text("resuming from /runs/step 7/checkpoint-40\nLoading\n")
    assert resumed_step(log) == 40
    assert not has_stepped(log)
    log.write_text(log.read_text() + "step  41/90  loss 1.0\n")
    assert has_stepped(log)


def test_the_last_step_is_read_from_the_end_of_the_file_whatever_a_kill_left_there(tmp_path):
    assert last_step(tmp_path) == 0
    lines = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 900))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 900, "lo')
    assert last_step(tmp_path) == 899


def test_plans_are_reproducible_and_of_all_kinds():
    plans = [draw_plan(random.Random(seed), 60, (2, 1)) for seed in range(100)]
    assert plans == [draw_plan(random.Random(seed), 60, (2, 1)) for seed in range(100)]
    assert {(plan.ranks, plan.rank) for plan in plans} == {(1, 0), (2, 0), (2, 1)}
    assert {plan.phase for plan in plans} == {"start-up", "training", "save"}
    assert len({plan.victims for plan in plans}) == 3


def test_runs_that_end_at_different_steps_differ(tmp_path):
    for run, step in (("a", 10), ("b", 20)):
        (tmp_path / run / f"checkpoint-{step}").mkdir(parents=True)
    assert differences(tmp_path / "a", tmp_path / "b") == [
        "the last checkpoint is checkpoint-20 instead of checkpoint-10"
    ]


def write_run(run, losses, last=10, score=1.0):
    """A finished run with a loss a step, the last of them held out as well."""
    (run / f"checkpoint-{last}").mkdir(parents=True)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    lines.append({"step": len(losses), "eval_loss": losses[-1]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"step": 3, "num_kept": 2, "kept": {"q": [0, 2]}, "returned": 0, "final": True, "scores": {"q": score}}
    (run / "allocation.jsonl").write_text(json.dumps(event) + "\n")
    return run


@pytest.mark.parametrize(
    ("losses", "last", "message"),
    [
        ([1.0, 1.001], 10, None),
        ([1.0, 1.1], 10, "held-out losses differ by more than 1% at 1 steps"),
        ([1.0], 10, "do not have lines of the same steps"),
        ([1.0, 1.0], 20, "checkpoint-20 instead of checkpoint-10"),
    ],
)
def test_what_is_too_far_for_an_elastic_soak(tmp_path, losses, last, message):
    apart = distances(write_run(tmp_path / "a", [1.0, 1.0]), write_run(tmp_path / "b", losses, last, score=1.1))
    assert apart["events_equal"]
    assert [message in text for text in too_far(apart)] == ([True] if message else [])
    assert apart["loss"]["largest"] == pytest.approx(max(losses) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kills": 0}, "nothing was killed"),
        ({"minutes": 1.0}, "took 1.0 minutes only"),
        ({"peaks_drift": 0.2}, "20.0% above"),
        ({}, None),
    ],
)
def test_what_fails_a_soak(change, message):
    killed = {"kills": 9, "minutes": 31.0, "peaks_drift": 0.01} | change
    result = {"killed": killed, "reference": {"growth_mib_per_1000_steps": 0.5}, "arguments": {"minutes": 30}}
    failures = judge(result, [], [])
    assert [message in failure for failure in failures] == ([True] if message else [])
    assert judge(result, ["adapter differs"], [17])[0] == "adapter differs"


def test_sessions_that_never_stepped_or_had_fewer_ranks_say_nothing_about_memory():
    kill = {"ranks": 2, "phase": "training", "victims": "one rank"}
    common = {"ranks": 2, "unfinished_checkpoint_left": True, "steps_taken_again": 3, "seconds": 90.0}
    sessions = [
        {"kill": kill, "stepped": True, "resumed_from_step": 0, "peak_mib": 600.0, **common},
        {"kill": kill, "stepped": False, "resumed_from_step": 40, "peak_mib": 100.0, **common},
        {"kill": kill, "stepped": True, "resumed_from_step": 40, "peak_mib": 605.0, **common},
        {"kill": None, "stepped": True, "resumed_from_step": 80, "peak_mib": 606.0, **common},
        {"kill": None, "stepped": True, "resumed_from_step": 80, "peak_mib": 900.0, **common, "ranks": 1},
    ]
    summary = summarize(sessions)
    assert summary["peaks_drift"] == 0.01
    assert (summary["kills"], summary["resumes"], summary["steps_taken_again"], summary["minutes"]) == (3, 4, 15, 7.5)
    assert summary["kills_by_kind"] == {"ranks: 2": 3, "phase: training": 3, "victims: one rank": 3}
