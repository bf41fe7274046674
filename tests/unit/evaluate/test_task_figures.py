"""Figures of base and adapter side by side, their errors, and where they are recorded."""

import json
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.trained_run import make_base, make_run

from dora_dist.config.format_version import ADAPTER_WEIGHTS
from dora_dist.evaluate import __main__ as command
from dora_dist.evaluate.harness import figures_of
from dora_dist.runs.task_figures import (
    TaskFigure,
    digest_of,
    latest_figures,
    line_of,
    paired_error,
    record_line,
    table_of,
)

BASE = {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
ADAPTER = {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}


def figure(**changes: object) -> TaskFigure:
    values = {"task": "colours", "metric": "acc", "examples": 4, "base": 0.5, "adapter": 0.75}
    errors = {"base_error": 0.25, "adapter_error": None, "difference_error": 0.125}
    return TaskFigure(**{**values, **errors, **changes})


def test_figures_that_are_recorded_after_a_torn_line_are_found(tmp_path):
    record_line(tmp_path, line_of("adapter", [figure(adapter=0.5)], {}))
    path = tmp_path / "evaluations.jsonl"
    path.write_text(path.read_text() + '{"adapter": "adap')
    record_line(tmp_path, line_of("adapter", [figure()], {}))
    assert latest_figures(tmp_path) == [figure()]


def test_the_error_of_a_difference_is_that_of_the_differences_of_examples():
    differences = [ADAPTER[number] - BASE[number] for number in BASE]
    expected = statistics.stdev(differences) / len(differences) ** 0.5
    assert paired_error(BASE, ADAPTER, 0.5, 0.75) == pytest.approx(expected)
    assert paired_error(BASE, BASE, 0.5, 0.5) == 0


@pytest.mark.parametrize(
    ("base", "adapter", "means"),
    [
        (BASE, ADAPTER, (0.5, 0.7)),
        (BASE, ADAPTER, (float("nan"), 0.75)),
        (BASE, {0: 1.0, 1: 1.0}, (0.5, 1.0)),
        ({0: 1.0}, {0: 0.0}, (1.0, 0.0)),
        ({}, {}, (0.5, 0.5)),
    ],
    ids=["no mean", "no number", "other examples", "one example", "no example"],
)
def test_there_is_none_where_it_would_not_be_that(base, adapter, means):
    assert paired_error(base, adapter, *means) is None


def result(values: dict[int, float]) -> dict:
    """As the harness has it, of a task and a group of it."""
    mean = statistics.fmean(values.values())
    entries = {"alias": "c", "acc,none": mean, "acc_stderr,none": 0.1, "f1,strict": 0.3, "f1_stderr,strict": "N/A"}
    samples = [{"doc_id": number, "filter": "none", "acc": value} for number, value in values.items()]
    samples += [{"doc_id": number, "filter": "strict", "acc": 0.9} for number in values]
    return {
        "results": {"colours": {**entries, "sample_len": 4}, "all": {"acc,none": mean}},
        "n-samples": {"colours": {"original": 9, "effective": 4}},
        "samples": {"colours": samples},
    }


def test_figures_stand_side_by_side_with_what_is_known_of_them():
    acc, f1, group = figures_of(result(BASE), result(ADAPTER))
    assert (acc.task, acc.metric, acc.examples, acc.base, acc.adapter) == ("colours", "acc", 4, 0.5, 0.75)
    assert (acc.base_error, acc.difference) == (0.1, 0.25)
    assert acc.difference_error == paired_error(BASE, ADAPTER, 0.5, 0.75)
    assert (f1.metric, f1.base_error, f1.difference_error) == ("f1:strict", None, None)
    assert (group.task, group.examples, group.difference_error) == ("all", None, None)


def test_the_table_has_base_adapter_and_difference():
    lines = table_of([figure(), figure(task="all", examples=None, adapter=0.25, difference_error=None)]).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "colours", "all"]
    assert "0.5000 ± 0.2500" in lines[1]
    assert lines[1].endswith("+0.2500 ± 0.1250")
    assert lines[2].endswith("-0.2500")


def test_the_latest_figures_of_an_adapter_are_found_again(tmp_path):
    record_line(tmp_path, line_of("adapter", [figure(), figure(metric="f1")], {"limit": 3}))
    record_line(tmp_path, line_of("checkpoint-5", [figure(base=0.1)], {}))
    record_line(tmp_path, line_of("adapter", [figure(base=0.3)], {}))
    assert latest_figures(tmp_path) == [figure(base=0.3), figure(metric="f1")]
    assert json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])["limit"] == 3
    assert latest_figures(tmp_path / "nowhere") == []


def test_figures_of_weights_that_are_not_there_any_more_are_left_out(tmp_path):
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    weights.parent.mkdir()
    record_line(tmp_path, line_of("adapter", [figure(metric="of no digest")], {}))
    for name in ("first", "second"):
        weights.write_text(name)
        about = {"adapter_sha256": digest_of(weights.parent)}
        record_line(tmp_path, line_of("adapter", [figure(metric=f"of the {name}")], about))
    assert [one.metric for one in latest_figures(tmp_path)] == ["of no digest", "of the second"]
    weights.write_text("first")
    assert [one.metric for one in latest_figures(tmp_path)] == ["of no digest", "of the first"]
    weights.unlink()
    assert [one.metric for one in latest_figures(tmp_path)] == ["of no digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", ","], r"--tasks is \[','\], but must name a task"),
        (["--tasks", "a", "--limit", "0"], "--limit is 0, but must be at least 1"),
        (["--tasks", "a", "--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (["--tasks", "a", "--include-path", "nowhere"], "--include-path is nowhere, but must be a folder"),
        (["--tasks", "a", "--output", "nowhere/x.json"], "--output is nowhere/x.json, but must lie in a folder"),
        (["--tasks", "a", "--output", "."], "--output is ., but must be a file, and not a folder"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        command.main(["run", *options])


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_it_says_how_to_install_it(tmp_path):
    with pytest.raises(ValueError, match=r"lm-eval, which is not installed: pip install .dora-dist\[evaluate\]"):
        command.main([str(tmp_path), "--tasks", "arc_easy"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return make_run(folder / "run", make_base(folder / "base")).folder


def test_the_card_has_the_latest_table_once(run):
    for base in (0.5, 0.25):
        record_line(run, line_of("adapter", [figure(base=base)], {}))
        command._add_to_card(run)
    card = (run / "adapter" / "README.md").read_text()
    assert card.count("## Tasks") == 1
    assert "0.2500 ± 0.2500" in card
    assert "from peft import PeftModel" in card
