"""The page of runs, from records as a run writes them; ``tests/e2e/test_page.py`` opens it in a browser."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.tiny_run import some_fingerprint

from dora_dist.console import files
from dora_dist.page.contents import read_contents
from dora_dist.page.curves import HELD_OUT, MOST_POINTS
from dora_dist.page.document import REFRESH_SECONDS, build_page, keep_current, write_page
from dora_dist.page.library import chart_library
from dora_dist.page.rank_map import MOST_FRAMES
from dora_dist.report import main
from dora_dist.runs import records
from dora_dist.runs.claim import Claim

LAYERS = [f"model.layers.{block}.self_attn.{kind}" for block in range(3) for kind in ("k_proj", "q_proj")]
HOSTILE = "</script><script>alert('x')</script> \"it's\" & <b> مرحبا 珍妮 👩‍👩‍👧 \ud800\x00\x1b[31m"


def event(step: int, ranks: list[int], *, final: bool = False, scores: list[float] | None = None) -> dict:
    return {
        "step": step,
        "num_kept": sum(ranks),
        "kept": {name: list(range(rank)) for name, rank in zip(LAYERS, ranks, strict=True)},
        "returned": 0,
        "final": final,
        "num_parameters": 100_000 * sum(ranks),
        "scores": None if scores is None else dict(zip(LAYERS, scores, strict=True)),
    }


EVENTS = [
    event(10, [6, 5, 6, 5, 6, 5], scores=[0.6, 0.5, 0.4, 0.3, 0.2, 0.123456]),
    event(20, [1, 2, 3, 4, 5, 6], final=True, scores=[0.0] * 6),
]


def write_run(folder: Path, metrics: list[dict], events: list[dict] = EVENTS, answers: list[dict] = (), **settings):
    """The records of a run of 40 steps, 6 layers and 6 components in each at the start."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {records.METRICS: metrics, records.ALLOCATION: events, records.ANSWERS: answers}
    for name, content in lines.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in content))
    fingerprint = some_fingerprint(num_steps=40, initial_rank=6, adapter={"target_rank": 3}, **settings)
    files.write_json(folder / records.RUN, {"settings": fingerprint.as_dict()})
    return folder


def training(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "learning_rate": 1e-3 / step, "tokens_per_second": 900.0, "components": 36}


def held_out(step: int, loss: float, **sources: float) -> dict:
    line = {"step": step, "eval_loss": loss, "eval_exact_match": 0.25, "eval_examples": 4}
    for name, value in sources.items():
        line |= {f"eval_{name}_loss": value, f"eval_{name}_examples": 2}
    return line


def test_the_training_time_of_a_page_is_that_of_all_sessions(tmp_path):
    lines = [training(step, 1.0) | {"seconds_per_step": 6.0} for step in (10, 20)]
    run = write_run(tmp_path / "run", [*lines, {"step": 20, "session_seconds": 1.0, "session_tokens": 9}])
    assert ["training time", "2 min"] in read_contents([run]).facts


def drawn(contents) -> dict[str, list[tuple[str, list, list]]]:
    return {p.title: [(c.name, c.steps, c.values) for c in p.curves] for p in contents.panels}


class Page(HTMLParser):
    """Elements and texts of a page, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_one_run_has_its_sources_in_one_chart_and_its_budget_in_steps(tmp_path):
    metrics = [held_out(0, 3.0, de=2.0, fr=4.0), training(10, 2.5), training(20, 2.0), held_out(20, 1.5, de=1.0, fr=2)]
    metrics[2]["peak_memory_bytes"] = 3 * 2**30
    found = drawn(read_contents([write_run(tmp_path / "run", metrics)]))
    assert found["training loss"] == [("run", [10, 20], [2.5, 2.0])]
    assert found["held-out loss"] == [
        ("all sources", [0, 20], [3.0, 1.5]),
        ("de", [0, 20], [2.0, 1.0]),
        ("fr", [0, 20], [4.0, 2.0]),
        ("before training", [0, 20], [3.0, 3.0]),
    ]
    assert found["exact match"] == [
        ("all sources", [0, 20], [25.0, 25.0]),
        ("before training", [0, 20], [25.0, 25.0]),
    ]
    assert found["components kept"] == [("run", [0, 10, 20], [36, 33, 21]), ("target", [0, 20], [18, 18])]
    assert found["parameters of the kept components"] == [("run", [10, 20], [3.3, 2.1])]
    assert found["peak memory since the start"] == [("run", [20], [3.0])]
    assert found["speed"] == [("run", [10, 20], [900.0, 900.0])]
    assert "gradient norm" not in found, "nothing has logged it"


def test_several_runs_have_a_chart_for_each_source_and_one_colour_each(tmp_path):
    a = write_run(tmp_path / "a", [held_out(20, 1.5, de=1.0, fr=2.0)], seed=1)
    b = write_run(tmp_path / "b", [training(5, 3.0), held_out(10, 2.5, de=2.0, en=7.0)], seed=2)
    contents = read_contents([a, b])
    found = drawn(contents)
    assert found["held-out loss"] == [("a", [20], [1.5]), ("b", [10], [2.5])]
    assert found["held-out loss, de"] == [("a", [20], [1.0]), ("b", [10], [2.0])]
    assert found["held-out loss, en"] == [("b", [10], [7.0])]
    assert {(c.name, c.colour) for p in contents.panels for c in p.curves if not c.dashed} == {("a", 0), ("b", 1)}
    assert [one.run for one in contents.maps] == ["a", "b"]
    assert contents.settings == [["setting", "a", "b"], ["seed", "1", "2"]]
    assert contents.facts[0] == ["", "a", "b"]


def test_a_chart_of_one_point_has_axes_around_it_and_the_base_is_named(tmp_path):
    metrics = [{**held_out(0, 6.0), "eval_exact_match": 0.0}]
    contents = read_contents([write_run(tmp_path, metrics, [])])
    found = {panel.title: panel for panel in contents.panels}
    assert set(found) == {"held-out loss", "exact match"}
    (loss,) = found["held-out loss"].curves
    assert (loss.steps, loss.values, found["held-out loss"].y) == ([0], [6.0], (0, 12.0))
    assert found["held-out loss"].x == pytest.approx((-1.2, 41.2)), "the run has 40 steps"
    assert found["exact match"].y == (-3, 103)
    assert ["held-out loss", "6.0000 (before training)"] in contents.facts
    more = read_contents([write_run(tmp_path, [*metrics, held_out(20, 1.5)], [])])
    assert [(panel.x, panel.y) for panel in more.panels] == [(None, None)] * 2
    assert ["held-out loss", "6.0000 -> 1.5000"] in more.facts


def test_a_penalty_that_is_off_has_no_chart(tmp_path):
    off = [training(step, 2.0) | {"equilibrium_penalty": 0.0} for step in (1, 2)]
    assert "equilibrium penalty" not in drawn(read_contents([write_run(tmp_path, off)]))
    on = [off[0] | {"equilibrium_penalty": 0.1}, off[1]]  # it is 0 after the final event
    found = drawn(read_contents([write_run(tmp_path, on)]))
    assert found["equilibrium penalty"] == [(tmp_path.name, [1, 2], [0.1, 0.0])]


def test_the_page_tells_a_newcomer_what_it_shows_and_which_direction_is_good(tmp_path):
    metrics = [training(step, 2.0) | {"grad_norm": 1.0, "peak_memory_bytes": 9} for step in (1, 2)]
    contents = read_contents([write_run(tmp_path, [*metrics, held_out(2, 1.0)])])
    page = Page(build_page(contents, refreshes=False))
    said = page.texts["p"]
    (what,) = (text for text in said if text.startswith("A run trains an adapter: "))
    assert "A component is " in what
    assert said[said.index(what) + 1].startswith("At an event, ")
    assert len({panel.about for panel in contents.panels}) == len(contents.panels) == 9
    for panel in contents.panels:
        assert panel.about in said
        assert re.search("better|good|sets", panel.about), panel.title
    assert all(metric.about for metric in HELD_OUT.values())


def test_runs_of_one_name_are_told_apart_and_one_run_twice_is_refused(tmp_path):
    runs = [write_run(tmp_path / parent / "run", []) for parent in ("x", "y")]
    assert [one.run for one in read_contents(runs).maps] == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="is given twice, but a page shows a run once"):
        read_contents([runs[0], runs[1] / ".." / ".." / "x" / "run"])


def test_the_map_has_the_start_every_event_and_their_scores(tmp_path):
    (found,) = read_contents([write_run(tmp_path, [])]).maps
    assert (found.rows, found.columns, found.most) == (["0", "1", "2"], ["q_proj", "k_proj"], 6)
    assert [(f.step, f.kept, f.final) for f in found.frames] == [(0, 36, False), (10, 33, False), (20, 21, True)]
    assert [f.ranks for f in found.frames] == [[[6, 6]] * 3, [[5, 6]] * 3, [[2, 1], [4, 3], [6, 5]]]
    assert [f.scores for f in found.frames] == [None, [[0.5, 0.6], [0.3, 0.4], [0.1235, 0.2]], [[0.0, 0.0]] * 3]


def test_a_run_of_fixed_ranks_begins_with_its_only_event(tmp_path):
    (found,) = read_contents([write_run(tmp_path, [], [event(0, [1, 2, 3, 4, 5, 6], final=True)])]).maps
    assert [(f.step, f.final, f.scores) for f in found.frames] == [(0, True, None)]


def test_records_of_an_earlier_version_have_no_scores_and_no_answers(tmp_path):
    old = [{name: value for name, value in line.items() if name != "scores"} for line in EVENTS]
    run = write_run(tmp_path, [training(1, 2.0)], old)
    (run / records.ANSWERS).unlink()
    contents = read_contents([run])
    assert [frame.scores for frame in contents.maps[0].frames] == [None] * 3
    assert contents.examples == []


def test_what_is_too_much_to_draw_is_thinned_keeps_its_last_point_and_says_so(tmp_path):
    metrics = [training(step, 1.0) for step in range(1, 2 * MOST_POINTS + 2)]
    events = [event(step, [6] * 6) for step in range(1, 2 * MOST_FRAMES)] + [event(2 * MOST_FRAMES, [5] * 6)]
    contents = read_contents([write_run(tmp_path, metrics, events)])
    loss = contents.panels[0]
    assert loss.note == "one point of 3 is drawn"
    assert len(loss.curves[0].steps) <= MOST_POINTS
    assert loss.curves[0].steps[-1] == 2 * MOST_POINTS + 1
    assert contents.maps[0].note == "one event of 2 is shown"
    assert (contents.maps[0].frames[-1].step, contents.maps[0].frames[-1].kept) == (2 * MOST_FRAMES, 30)


def test_values_that_are_not_finite_are_gaps_and_are_named(tmp_path):
    metrics = [training(1, 2.0), training(2, math.nan), training(3, math.inf), training(4, 1.0)]
    contents = read_contents([write_run(tmp_path, metrics)])
    assert drawn(contents)["training loss"] == [(tmp_path.name, [1, 2, 3, 4], [2.0, None, None, 1.0])]
    assert ["values that are not finite", "at steps 2-3"] in contents.facts
    build_page(contents, refreshes=False)  # JSON has no NaN


def test_hostile_texts_are_shown_and_never_obeyed(tmp_path):
    answers = [
        {"step": step, "source": HOSTILE, "number": 0, "prompt": HOSTILE, "reference": "<i>", "answer": f"{step}</dd>"}
        for step in (10, 20)
    ]
    run = write_run(tmp_path / "</title><script>" / "run", [held_out(10, 2.0, **{HOSTILE: 2.0})], answers=answers)
    write_page([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 3, "the data, the library, the page's own"
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    said = "".join(page.texts["dd"])
    assert "</script><script>alert('x')</script> \"it's\" & <b> مرحبا 珍妮 👩‍👩‍👧 \\ud800\\x00\\x1b[31m" in said
    assert "".join(page.texts["dd"]).index("20</dd>") < said.index("10</dd>"), "the latest answer stands first"
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    names = [curve["name"] for panel in json.loads(data)["panels"] for curve in panel["curves"]]
    assert HOSTILE in names


def test_answers_of_several_runs_to_one_prompt_stand_together(tmp_path):
    def answer(step, prompt, text):
        return {"step": step, "source": "de", "number": 1, "prompt": prompt, "reference": "4", "answer": text}

    a = write_run(tmp_path / "a", [], answers=[answer(0, "2+2", "?"), answer(20, "2+2", "5")])
    b = write_run(tmp_path / "b", [], answers=[answer(20, "2+2", "4"), answer(20, "two and two", "")])
    contents = read_contents([a, b])
    assert '<dd dir="auto"><span class="faint">(nothing)</span></dd>' in build_page(contents, refreshes=False)
    same, other = contents.examples
    assert same.title == "de, example 2"
    assert same.answers == [("step 20, a", "5"), ("step 20, b", "4"), ("step 0, a", "?")]
    assert (other.prompt, other.answers) == ("two and two", [("step 20, b", "")])


def test_the_page_asks_nobody_for_anything(tmp_path):
    write_page([write_run(tmp_path, [training(1, 2.0)])], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count(chart_library()) == 1
    assert "Copyright (c) Anaconda, Inc., and Bokeh Contributors" in text, "its licence goes with it"
    # The library has addresses of what is not used here; that none is asked is seen in tests/e2e/test_page.py.
    own = text.replace(chart_library(), "")
    assert not re.findall(r"[a-z]*:?//[a-z][\w.-]*\.[a-z]+[^\s\"')]*", own)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", own)
    assert 1_000_000 < len(text) < 1_600_000
    page = Page(text)
    assert not [tag for tag, attributes in page.elements if {"src", "href", "srcset"} & attributes.keys()]
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def refresh_of(path: Path) -> list[str]:
    return [a["content"] for _, a in Page(path.read_text()).elements if a.get("http-equiv") == "refresh"]


def test_only_the_page_of_a_run_that_is_going_on_refreshes_itself(tmp_path):
    run = write_run(tmp_path / "run", [training(12, 2.0)])
    page = run / records.PAGE
    claim = Claim(run)
    claim.take()
    keep_current(run)
    assert refresh_of(page) == [str(REFRESH_SECONDS)]
    assert "run is running, at step 12 of 40." in page.read_text()
    write_page([run], tmp_path / "copy.html")
    assert refresh_of(tmp_path / "copy.html") == [], "nobody writes this one again"
    claim.release()
    keep_current(run)
    assert refresh_of(page) == []
    assert "run stopped at step 12 of 40 without a word (killed?). Start the same command again" in page.read_text()
    files.write_json(run / records.SUMMARY, {})
    keep_current(run)
    assert refresh_of(page) == []
    assert "run ended, at step 12 of 40." in page.read_text()


def test_a_page_that_cannot_be_written_is_a_remark(tmp_path, capsys):
    run = write_run(tmp_path / "run", [])
    (run / records.PAGE).mkdir()
    keep_current(run)
    (run / records.RUN).unlink()
    keep_current(run)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{run / records.PAGE} could not be written; the run continues without it: IsADirectory")
    assert "it has no run.json" in second


def test_without_bokeh_the_command_ends_before_it_draws_and_a_run_goes_on(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [training(1, 2.0)])
    before = sorted(os.listdir(run))
    monkeypatch.setitem(sys.modules, "bokeh.resources", None)
    with pytest.raises(
        ValueError, match=r"^bokeh draws the charts of a page, but cannot be imported \(.*\): pip install"
    ):
        main([str(run), "--html"])
    assert (sorted(os.listdir(run)), capsys.readouterr().out) == (before, "")
    keep_current(run)
    assert "could not be written; the run continues without it: ValueError: bokeh draws" in capsys.readouterr().err
    main([str(run)])


def test_the_command_writes_the_page_of_a_run_into_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", [training(1, 2.0)])
    main([str(run)])
    assert not (run / records.PAGE).exists()
    main([str(run), "--html"])
    assert (run / records.PAGE).is_file()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["page", str(run / records.PAGE)]


def test_the_command_lays_runs_beside_each_other(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, [training(1, 2.0)], seed=n)) for n, name in enumerate(("a", "b", "c"))]
    main([*runs, "--html", str(tmp_path / "out.html")])
    assert "3 runs: a, b, c" in (tmp_path / "out.html").read_text()
    assert [f"Run {run}, 1 optimizer steps" in capsys.readouterr().out for run in runs[:1]] == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "b", "--html"], "--html has no file, but there are 2 runs: name it, as in --html runs.html"),
        (["a", "--html", "b"], "--html is b, but a page is a file named *.html: name one, after the runs"),
        (["a", "--html", "nowhere/x.html"], "--html is nowhere/x.html, but there is no folder nowhere: make it, or"),
        (["a", "nothing"], "there is no folder nothing: give the output_dir of a run"),
    ],
)
def test_a_page_without_a_place_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, options, message):
    for name in ("a", "b"):
        write_run(tmp_path / name, [training(1, 2.0)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        main(options)
    if "--html" in options:
        assert not [name for name in os.listdir("a") if name.endswith((".png", ".html"))]
