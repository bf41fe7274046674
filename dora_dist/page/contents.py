"""Collects a page's content from the runs' records alone."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dora_dist.console.text import format_bytes, ranges, time_span
from dora_dist.page.curves import BEFORE, HELD_OUT, Panel, panels
from dora_dist.page.open_run import OpenRun, open_runs
from dora_dist.page.rank_map import RankMap, rank_map
from dora_dist.runs.summary import change

MOST_STEPS_NAMED = 10
"""Number of steps that are listed individually in the table."""
MOST_OF_SETTING = 80
"""Most characters of a setting in the table."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A held-out example with its generated answers.

    Attributes:
        title: its source and number.
        prompt: the prompt given to the models.
        reference: the answer in the data.
        answers: (run and step, answer at that step); the latest first.
    """

    title: str
    prompt: str
    reference: str
    answers: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The complete content of a page.

    Attributes:
        title: title of the page.
        states: one sentence for each run about its state.
        written: date and time.
        facts: a table with the names of the runs as header, and one row for each figure.
        settings: table of the same form with the settings in which several runs differ; empty for one run.
        panels: charts.
        maps: maps of the ranks, one for each run.
        examples: examples with answers generated at evaluations.
        alive: whether one of the runs is still running.
    """

    title: str
    states: list[str]
    written: str
    facts: list[list[str]]
    settings: list[list[str]]
    panels: list[Panel]
    maps: list[RankMap]
    examples: list[Example]
    alive: bool


def read_contents(folders: Sequence[Path]) -> Contents:
    """Read the content of a page.

    Args:
        folders: folders of the runs, which may still be running.

    Raises:
        ValueError: a folder is not a run's folder, or is given twice.
    """
    runs = open_runs(folders)
    names = [run.name for run in runs]
    return Contents(
        title=f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        states=[f"{run.name} {run.state.text}." for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        facts=_facts(runs),
        settings=_settings(runs),
        panels=panels(runs),
        maps=[rank_map(run) for run in runs],
        examples=_examples(runs),
        alive=any(run.state.alive for run in runs),
    )


def _facts(runs: Sequence[OpenRun]) -> list[list[str]]:
    rows: dict[str, Callable[[OpenRun], str]] = {
        "base": lambda run: str(run.fingerprint.model.get("path", "")),
        "task": lambda run: run.fingerprint.task,
        **{metric.title: partial(_figure, key=key) for key, metric in HELD_OUT.items()},
        "held-out examples": lambda run: _number((run.summary["after"] or {}).get("examples")),
        "best checkpoint": _best,
        "components": _components,
        "parameters of the adapter": lambda run: _number(run.summary["parameters_kept"]),
        "training time": lambda run: time_span(s) if (s := run.summary["training_seconds"]) else "",
        "peak memory": _memory,
        "skipped steps": lambda run: _number(run.summary["skipped_steps"] or None),
        "values that are not finite": _not_finite,
        "not adapted": lambda run: run.summary["left_out"] or "",
    }
    table = [[title, *(fact(run) for run in runs)] for title, fact in rows.items()]
    return [["", *(run.name for run in runs)], *(row for row in table if any(row[1:]))]


def _figure(run: OpenRun, key: str) -> str:
    before, after = run.summary["before"], run.summary["after"]
    if not after or key not in after:
        return ""
    measured = max(line["step"] for line in run.lines if "eval_loss" in line)
    return change(before, after, key, HELD_OUT[key].style) + (f" ({BEFORE})" if measured == 0 else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _components(run: OpenRun) -> str:
    start, kept = run.summary["components_at_start"], run.summary["components_kept"]
    if start is None:
        return ""
    return f"{start:,} -> {kept:,}" + ("" if run.summary["final_event"] else " (pruning has not ended)")


def _best(run: OpenRun) -> str:
    best = run.summary["best"]
    return f"step {best['step']:,}, by {best['figure']}" if best else ""


def _memory(run: OpenRun) -> str:
    peak = max((line.get("peak_memory_bytes") or 0 for line in run.lines), default=0)
    return format_bytes(peak) if peak else ""


def _not_finite(run: OpenRun) -> str:
    """Steps with values that are not finite, which leave gaps in the curves."""
    steps = {
        line["step"]
        for line in run.lines
        if any(isinstance(value, float) and not math.isfinite(value) for value in line.values())
    }
    if not steps:
        return ""
    more = f" and {len(steps) - MOST_STEPS_NAMED:,} more" if len(steps) > MOST_STEPS_NAMED else ""
    return f"at steps {ranges(sorted(steps)[:MOST_STEPS_NAMED])}{more}"


def _settings(runs: Sequence[OpenRun]) -> list[list[str]]:
    settings = [run.fingerprint.as_dict() for run in runs]
    names = sorted({name for one in settings for name in one})
    rows = [[name, *(_setting(one, name) for one in settings)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    return [["setting", *(run.name for run in runs)], *different] if different else []


def _setting(settings: Mapping[str, object], name: str) -> str:
    if name not in settings:
        return ""
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= MOST_OF_SETTING else f"{text[:MOST_OF_SETTING]}..."


def _examples(runs: Sequence[OpenRun]) -> list[Example]:
    """Examples with their answers; runs with the same prompt share one example."""
    found: dict[tuple[str, int, str, str], Example] = {}
    lines = [(run, line) for run in runs for line in run.answers]
    for run, line in sorted(lines, key=lambda entry: -entry[1]["step"]):
        key = (line["source"], line["number"], line["prompt"], line["reference"])
        title = f"{line['source']}, example {line['number'] + 1}"
        example = found.setdefault(key, Example(title=title, prompt=line["prompt"], reference=line["reference"]))
        where = f"step {line['step']:,}" + f", {run.name}" * (len(runs) > 1)
        example.answers.append((where, line["answer"]))
    return [found[key] for key in sorted(found, key=lambda key: key[:2])]
