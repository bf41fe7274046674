from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dora_dist.method.budget import Budget
from dora_dist.method.schedule import (
    BudgetSchedule,
    GrowthSchedule,
    OneEvent,
    automatic_interval,
    twentieth_of_phase,
)


def make(total_steps: int = 1000, **changes) -> BudgetSchedule:
    values = {"num_layers": 7, "initial_rank": 12, "target_rank": 8, "interval": 100}
    return BudgetSchedule(total_steps=total_steps, **{**values, **changes})


@st.composite
def schedules(draw) -> BudgetSchedule:
    target = draw(st.integers(1, 64))
    warmup, final = draw(st.integers(0, 99)), draw(st.integers(0, 99))
    total_steps = draw(st.integers(1, 1500))
    assume(warmup + final < 100)
    assume(int(total_steps * (1 - warmup / 100 - final / 100)) >= 1)
    return make(
        total_steps,
        num_layers=draw(st.integers(1, 300)),
        initial_rank=target + draw(st.integers(0, 64)),
        target_rank=target,
        warmup_fraction=warmup / 100,
        final_fraction=final / 100,
        interval=draw(st.integers(1, 200)),
    )


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_every_run_goes_from_the_initial_to_the_target_rank_in_monotone_steps(schedule):
    steps = range(1, schedule.total_steps + 1)
    pruned = [schedule.num_pruned(step) for step in steps]
    assert pruned == sorted(pruned)
    assert schedule.num_pruned(schedule.final_step) == schedule.num_layers * (
        schedule.initial_rank - schedule.target_rank
    )
    assert pruned[-1] == schedule.num_components - schedule.final_num_kept
    warmup = schedule.total_steps * schedule.warmup_fraction
    assert all(schedule.num_pruned(step) == 0 for step in steps if step <= warmup)


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_the_last_event_is_the_final_step_and_lies_within_the_run(schedule):
    events = [step for step in range(1, schedule.total_steps + 1) if schedule.is_prune_step(step)]
    assert events == schedule.prune_steps
    assert events[-1] == schedule.final_step
    earlier = [schedule.num_pruned(step) for step in events[:-1]]
    if schedule.initial_rank > schedule.target_rank:
        assert all(number < schedule.num_pruned(schedule.final_step) for number in earlier)


@pytest.mark.parametrize("total_steps", [7, 10, 13, 33, 99, 100, 101, 137, 203, 299, 1000, 1001, 4017, 100_000])
def test_the_final_step_is_where_the_run_length_puts_it(total_steps):
    schedule = make(total_steps)
    assert 0 <= schedule.final_step - total_steps // 2 <= 1
    assert schedule.is_prune_step(schedule.final_step)
    assert not any(schedule.is_prune_step(step) for step in range(schedule.final_step + 1, total_steps + 1))


def test_the_schedule_is_the_cubic_of_equation_9_in_exact_arithmetic():
    # 10^12 removable components and t = 3 (t_max) / 10: floating point loses components here.
    schedule = make(1000, num_layers=10**12, initial_rank=2, target_rank=1, warmup_fraction=0.0, final_fraction=0.0)
    for step in range(1, 1001):
        assert schedule.num_pruned(step) == int(10**12 * Fraction(step, 1000) ** 3)


def test_events_come_every_interval_and_at_the_end():
    # t = step - 30 runs to t_max = 70.
    assert make(200, interval=30).prune_steps == [30, 60, 90, 100]
    assert make(200, interval=1000).prune_steps == [30, 100]
    assert [make(200).num_pruned(step) for step in (29, 30, 65, 99, 100, 101, 200)] == [0, 0, 3, 26, 28, 28, 28]


def last_two_events(total_steps: int, phases: tuple[float, float], interval: int) -> tuple[int, int]:
    """Number of events of a run, and steps from the last but one to the last."""
    events = make(total_steps, warmup_fraction=phases[0], final_fraction=phases[1], interval=interval).prune_steps
    return len(events), events[-1] - events[-2]


@pytest.mark.parametrize(
    ("total_steps", "interval", "num_events", "seen"),
    [(350, 1, 21, 1), (1000, 5, 13, 4), (1500, 9, 11, 8), (2000, 7, 18, 7), (6000, 30, 13, 29)],
)
def test_the_final_event_sees_most_of_an_automatic_interval(total_steps, interval, num_events, seen):
    default = 0.04, 0.9
    assert automatic_interval(total_steps, *default) == interval
    assert last_two_events(total_steps, default, interval) == (num_events, seen)


@settings(max_examples=120, deadline=None)
@given(st.integers(60, 5000), st.sampled_from([(0.04, 0.9), (0.15, 0.5)]))
def test_no_other_interval_of_as_many_events_shows_the_final_one_a_larger_share(total_steps, phases):
    phase = max(1, int(total_steps * (1 - phases[0] - phases[1])))
    interval = automatic_interval(total_steps, *phases)
    num_events, seen = last_two_events(total_steps, phases, interval)
    if phase <= 20:
        assert interval == twentieth_of_phase(total_steps, *phases) == 1
        return
    assert 8 <= num_events <= 22
    assert Fraction(seen, interval) >= Fraction(1, 2)
    shortest = -(-phase // 20)
    for other in range(shortest, 2 * shortest):
        share = Fraction(last_two_events(total_steps, phases, other)[1], other)
        assert share < Fraction(seen, interval) or (share == Fraction(seen, interval) and other >= interval)


def test_equal_ranks_prune_nothing():
    schedule = make(500, initial_rank=8)
    assert {schedule.num_pruned(step) for step in range(1, 501)} == {0}
    assert schedule.final_num_kept == schedule.num_components == 56


@pytest.mark.parametrize(
    ("total_steps", "fractions", "last"), [(2, (0.15, 0.5), 2), (10, (0.04, 0.9), 3), (24, (0.04, 0.9), 3)]
)
def test_a_phase_shorter_than_a_step_has_one_event(total_steps, fractions, last):
    schedule = make(total_steps, warmup_fraction=fractions[0], final_fraction=fractions[1])
    assert schedule.prune_steps[-1] == schedule.final_step == last
    assert all(schedule.num_pruned(step) == 0 for step in schedule.prune_steps[:-1]), "no gate has a gradient yet"
    assert schedule.num_pruned(last) == schedule.num_components - schedule.final_num_kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"target_rank": 0}, "target_rank is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"initial_rank": 7}, "initial_rank is 7, below target_rank 8"),
        ({"warmup_fraction": -0.1}, "warmup_fraction is -0.1"),
        ({"final_fraction": 1.0}, "final_fraction is 1.0"),
        ({"warmup_fraction": 0.5, "final_fraction": 0.5}, "no step to prune in"),
        ({"total_steps": 1}, "1 optimizer steps with warmup_fraction 0.15 and final_fraction 0.5"),
    ],
)
def test_impossible_schedules_are_refused_with_the_value_and_the_knob(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{"total_steps": 200, **changes})


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 64))
def test_growth_rises_in_a_straight_line_from_the_start_to_the_budget(pruning, more):
    start, target = pruning.target_rank, pruning.target_rank + more
    values = {**{field: getattr(pruning, field) for field in pruning.__dataclass_fields__}, "initial_rank": start}
    schedule = GrowthSchedule(**{**values, "target_rank": target})
    assert schedule.prune_steps == pruning.prune_steps
    added = [-schedule.removed(step, -1000) for step in range(1, schedule.total_steps + 1)]
    assert added == sorted(added)
    assert added[schedule.final_step - 1] == 1000
    first, last = schedule.prune_steps[0], schedule.final_step
    assert schedule._position(first) > 0 or added[first - 1] == 0
    for step in schedule.prune_steps:
        position = int(step - schedule.total_steps * schedule.warmup_fraction)
        wanted = Fraction(1000 * min(position, schedule._last), schedule._last)
        assert 0 <= wanted - added[step - 1] < 1
    assert Budget(schedule, {"wide": 5, "narrow": 2}).at(last) == 7 * target
    assert Budget(schedule, {"wide": 5, "narrow": 2}).initial == 7 * start


@pytest.mark.parametrize(("start", "target"), [(0, 2), (2, 2), (3, 2)])
def test_what_grows_starts_below_its_end(start, target):
    with pytest.raises(ValueError, match=f"initial_rank is {start} and target_rank {target}, but growth must start"):
        GrowthSchedule(total_steps=100, num_layers=1, initial_rank=start, target_rank=target)


def test_of_one_event_only_the_last_of_the_schedule_takes_place():
    for total in (12, 200, 333):
        schedule = OneEvent(total_steps=total, num_layers=1, initial_rank=2, target_rank=2, interval=2)
        all_events = make(total_steps=total, interval=2)
        assert schedule.prune_steps == [all_events.final_step] == [schedule.final_step]
