"""What takes long is said: looked at with a clock of the test's own, and once by the thread."""

import threading

import pytest

from dora_dist.console import phases
from dora_dist.console.phases import Phases
from dora_dist.console.text import say, time_span


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(phase):
    """A watch that has seen its phase begin, and the function that lets seconds pass, looking at each."""
    clock = Clock()
    watch = Phases(phase, clock)
    watch.look()

    def wait(seconds):
        for _ in range(seconds):
            clock.now += 1
            watch.look()

    return watch, wait


def test_a_phase_is_said_after_ten_seconds_and_then_less_and_less_often(capsys):
    _, wait = watched("loading the model")
    wait(9)
    assert capsys.readouterr().err == ""
    wait(141)
    said = [line.removeprefix("still in: loading the model ") for line in capsys.readouterr().err.splitlines()]
    assert said == ["(10 s)", "(30 s)", "(1 min 10 s)", "(2 min 30 s)"]


def test_every_phase_that_takes_long_is_said_and_short_ones_are_not(capsys):
    watch, wait = watched("preparing data")
    wait(12)
    for phase, seconds in (("joining the process group", 5), ("loading the model", 5), ("evaluation", 11)):
        watch.phase = phase
        wait(seconds)
    assert capsys.readouterr().err.splitlines() == ["still in: preparing data (10 s)", "still in: evaluation (10 s)"]


def test_where_something_is_said_the_screen_is_not_silent(capsys):
    _, wait = watched("preparing data")
    for _ in range(5):
        wait(9)
        say("train: encoding")
    assert "still" not in capsys.readouterr().err
    wait(11)
    assert capsys.readouterr().err == "still in: preparing data (56 s)\n"


def test_steps_are_one_phase_so_that_rare_lines_of_progress_do_not_fill_the_log(capsys):
    watch, wait = watched("update of step 1")
    for step in range(2, 102):
        watch.phase = f"update of step {step}"
        wait(1)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("still in: update of step 11 ")
    assert len(said) == 3


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Phases("loading the model") as watch:
        assert not watch._thread.is_alive()
        watch.look()
    assert capsys.readouterr().err == ""


def test_the_thread_looks_until_the_end(monkeypatch):
    monkeypatch.setattr(phases, "LOOK_SECONDS", 0.001)
    looked = threading.Event()

    class Looking(Phases):
        def look(self) -> None:
            if threading.current_thread() is self._thread:
                looked.set()

    with Looking("loading the model") as watch:
        assert looked.wait(60)
    assert not watch._thread.is_alive()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (40, "40 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (12_000, "3 h 20 min"),
        (86_399, "24 h"),
        (187_200, "2 d 4 h"),
    ],
)
def test_time_is_said_in_two_units_at_most(seconds, text):
    assert time_span(seconds) == text
