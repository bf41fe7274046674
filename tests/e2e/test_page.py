"""The page of real runs in a real browser: while a run goes on, after it was killed, and after its end."""

import os
import re
import signal
import time

import pytest
from support.chromium import CHROMIUM, browser
from support.forked_run import log_of, run_forked, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config

from dora_dist.runs import records

pytestmark = [
    pytest.mark.full("pages"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no command chromium; apt-get install chromium"),
]
CELLS = """[...document.querySelectorAll(".map td:not(.mean)")].map(cell => cell.textContent)"""
MOVE = """(place => {
  const slider = document.getElementById("slider");
  slider.value = place;
  slider.dispatchEvent(new Event("input"));
  return document.querySelector(".map p").textContent;
})"""
SHOW_SCORES = """(() => {
  const quantity = document.getElementById("quantity");
  quantity.value = "scores";
  quantity.dispatchEvent(new Event("change"));
})()"""
DRAWN = """(async () => {
  const [red, green, blue] = theme("--series-0").slice(1).match(/../g).map(pair => parseInt(pair, 16));
  const canvases = root => [...root.querySelectorAll("*")].flatMap(
    one => one.matches("canvas") ? [one] : one.shadowRoot ? canvases(one.shadowRoot) : []);
  const drawn = canvas => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < data.length; i += 4) {
      if (data[i] === red && data[i + 1] === green && data[i + 2] === blue && data[i + 3] === 255) return true;
    }
  };
  const hosts = [...document.querySelectorAll(".chart")];
  while (!hosts.every(host => canvases(host).some(drawn))) await new Promise(again => setTimeout(again, 50));
  return hosts.length;
})()"""
"""Charts that have something in the first curve's colour, once all have."""
LEGENDS = """[...document.querySelectorAll(".legend")].map(one => one.textContent)"""
REFRESHES = """document.querySelector("meta[http-equiv=refresh]") !== null"""
STATES = """document.getElementById("states").textContent"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has ended, and one that was killed after an evaluation, with its page of that moment as text."""
    folder = tmp_path_factory.mktemp("pages")
    evaluation = {"before": True, "exact_match": True, "max_new_tokens": 4}
    every_third = {"eval_strategy": "steps", "eval_steps": 3}
    config = write_config(folder, evaluation=evaluation, training={"save_steps": 1000, **every_third})
    wait_for_ranks(start_run(config, folder / "ended", folder / "ended.log"), timeout=180)
    assert (folder / "ended" / records.SUMMARY).is_file(), log_of(folder / "ended.log")

    page = folder / "killed" / records.PAGE
    alone = ("--training.max_steps", "2000", "--distributed.engine", "none")
    ranks = start_run(config, folder / "killed", folder / "killed.log", *alone, ranks=1, more=("none",))
    while "at step 3 " not in (page.read_text() if page.is_file() else ""):
        assert all(rank.is_alive() for rank in ranks), log_of(folder / "killed.log")
        time.sleep(0.05)
    (folder / "alive.html").write_text(page.read_text())
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait_for_ranks(ranks, timeout=60)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def quiet(request, tab):
    """Nothing that a test opens says an error, or asks for more than the file itself."""
    tab.errors.clear()
    tab.requests.clear()
    yield
    assert tab.errors == []
    assert tab.requests
    assert {address.partition(":")[0] for address in tab.requests} == {"file"}


def test_the_slider_moves_the_map_from_the_start_over_the_events(runs, tab):
    tab.open(runs / "ended" / records.PAGE)
    events = records.read_events(runs / "ended" / records.ALLOCATION)
    assert [event.step for event in events] == [1, 2, 4, 6]
    last = tab.run(CELLS)
    assert sum(map(int, last)) == events[-1].num_kept
    assert tab.run(f"{MOVE}(0)") == "at the start: 56 components kept"
    assert tab.run(CELLS) == ["4"] * 14
    for place, event in enumerate(events, start=1):
        said = tab.run(f"{MOVE}({place})")
        assert said == f"event of step {event.step}: {event.num_kept} components kept" + ", ranks fixed" * event.final
        assert sum(map(int, tab.run(CELLS))) == event.num_kept
        assert tab.run("document.getElementById('position').textContent") == f"step {event.step}"
    assert tab.run(CELLS) == last
    tab.run(SHOW_SCORES)
    scores = [float(text) for text in tab.run(CELLS)]
    assert sorted(scores) == pytest.approx(sorted(events[-1].scores.values()), rel=1e-3)


def test_what_a_reader_has_chosen_survives_a_refresh(runs, tab):
    tab.open(runs / "ended" / records.PAGE)
    tab.run(f"{MOVE}(2)")
    tab.open(runs / "ended" / records.PAGE)
    assert tab.run("document.getElementById('position').textContent") == "step 2"
    tab.run(f"{MOVE}(4)")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_window(runs, tab, width, dark):
    tab.open(runs / "ended" / records.PAGE, width=width, dark=dark)
    titles = tab.run("[...document.querySelectorAll('figcaption')].map(title => title.firstChild.textContent.trim())")
    assert titles == [
        "training loss", "held-out loss", "exact match", "components kept", "parameters of the kept components",
        "learning rate", "gradient norm", "equilibrium penalty", "speed", "peak memory since the start",
    ]  # fmt: skip
    assert tab.run(DRAWN) == len(titles)
    ranges = "charts.map(({figure}, n) => [figure.y_range.start, figure.y_range.end, data.panels[n].y])"
    fixed = [(low, high, wanted) for low, high, wanted in tab.run(ranges) if wanted]
    assert all([low, high] == wanted for low, high, wanted in fixed)
    assert [-3, 103, [-3, 103]] in map(list, fixed), "a tiny random model matches nothing exactly, at any step"
    ends = "[...document.querySelectorAll('.prompt')].map(one => one.scrollHeight - one.clientHeight - one.scrollTop)"
    assert all(left < 2 for left in tab.run(ends))
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.picture()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_pointer_shows_one_step_in_all_charts_and_a_name_hides_its_curve(runs, tab):
    tab.open(runs / "ended" / records.PAGE)
    tab.run(DRAWN)
    assert {text.partition("ended")[0].partition("all")[0] for text in tab.run(LEGENDS)} == {"latest"}
    losses = {line["step"]: line["loss"] for line in records.read_metrics(runs / "ended") if "loss" in line}
    tab.run("pointAt(6)")
    legends = tab.run(LEGENDS)
    assert all(text.startswith("step 6") for text in legends)
    assert float(legends[0].removeprefix("step 6ended")) == pytest.approx(losses[6], rel=1e-3)
    left, top = tab.run("(({left, top}) => [left, top])(document.querySelector('.chart').getBoundingClientRect())")
    for place in (150, 151):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + place, y=top + 80)
    until = "(async () => { while (%s) await new Promise(again => setTimeout(again, 50)); return true; })()"
    assert tab.run(until % f"{LEGENDS}[0].startsWith('step 6')")
    assert tab.run(f"{LEGENDS}.every(text => text.startsWith('step ') && !text.startsWith('step 6'))")
    tab.run("document.querySelector('.legend button').click()")
    visible = "charts[0].figure.renderers.map(one => one.visible)"
    assert tab.run(visible) == [False, False]
    tab.run("document.querySelector('.legend button').click()")
    assert tab.run(visible) == [True, True]


def test_the_answers_of_every_evaluation_are_there(runs, tab):
    tab.open(runs / "ended" / records.PAGE)
    found = tab.run("[...document.querySelectorAll('article .answers')].map(one => one.children.length / 2)")
    lines = records.read_answers(runs / "ended")
    assert sorted({line["step"] for line in lines}) == [0, 3, 6, 9, 12]
    assert found == [5] * 4


def test_a_run_that_is_going_on_refreshes_and_after_a_kill_a_new_page_says_so(runs, tab):
    tab.open(runs / "alive.html")
    assert tab.run(REFRESHES)
    assert tab.run(STATES) == "killed is running, at step 3 of 2,000."
    made = run_forked("report", str(runs / "killed"), "--html")
    assert made.status == 0, made.output
    tab.open(runs / "killed" / records.PAGE)
    assert not tab.run(REFRESHES)
    assert re.match(r"killed stopped at step \d+ of 2,000 without a word \(killed\?\)\. ", tab.run(STATES))
    tab.open(runs / "ended" / records.PAGE)
    assert not tab.run(REFRESHES)
    assert tab.run(STATES) == "ended ended, at step 12 of 12."


def test_runs_stand_beside_each_other(runs, tab):
    both = runs / "both.html"
    made = run_forked("report", str(runs / "ended"), str(runs / "killed"), "--html", str(both))
    assert made.status == 0, made.output
    tab.open(both)
    assert tab.run("[...document.querySelectorAll('.map h3')].map(one => one.textContent)") == ["ended", "killed"]
    tab.run(DRAWN)
    names = "[...document.querySelector('.legend').querySelectorAll('bdi')].map(one => one.textContent)"
    assert tab.run(names) == ["ended", "killed"]
