"""The results of a comparison, from the cells' folders alone: ``results.json``, and the table ``results.md``."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dora_dist.compare.outcome import CellResult, training_settings
from dora_dist.compare.plan import Group, Plan
from dora_dist.compare.worker import Progress
from dora_dist.console import files
from dora_dist.evaluation.seeds import CONFIDENCE, RateChoice, holm, paired_difference, spread

RESULTS = "results.json"
TABLE = "results.md"


def gather(plan: Plan, notes: Sequence[str], command: str) -> dict[str, Any]:
    """All figures.

    Args:
        plan: of the comparison.
        notes: on the data, for the table.
        command: that this comparison is made by.

    Raises:
        ValueError: cells that are compared were not run under the same conditions.
    """
    progress = Progress(plan)
    choices = {group: progress.choice(group) for group in plan.groups}
    reported = {group: _reported(plan, progress, group, choices[group]) for group in plan.groups}
    _check_same_conditions(plan, reported)
    groups = [_group(plan, progress, group, choices[group], reported) for group in plan.groups]
    _adjust(groups)
    cells = list(_cells(plan, progress))
    environments = [cell["environment"] for cell in cells if cell["environment"]]
    return {
        "command": command,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "began": min((environment["began"] for environment in environments), default=None),
        "commits": sorted({str(environment["commit"]) for environment in environments}),
        "dirty": any(environment["dirty"] for environment in environments),
        "config": dataclasses.asdict(plan.config),
        "methods": {name: method.says for name, method in plan.methods.items()},
        "confidence": CONFIDENCE,
        "comparisons": sum((group["difference"] or {}).get("mean") is not None for group in groups),
        "notes": list(notes),
        "complete": not any(group["missing"] for group in groups),
        "groups": groups,
        "cells": cells,
    }


def _reported(plan: Plan, progress: Progress, group: Group, choice: RateChoice | None) -> dict[int, CellResult]:
    """Seed -> outcome, of the group's reported cells that have a finite figure."""
    if choice is None:
        return {}
    found = {cell.seed: progress.outcome(cell) for cell in plan.reported_cells(group, choice.learning_rate)}
    return {seed: outcome for seed, outcome in found.items() if outcome is not None and not outcome.diverged}


def _check_same_conditions(plan: Plan, reported: Mapping[Group, Mapping[int, CellResult]]) -> None:
    """Methods are compared on one base, with the same data in the same order, and as many steps.

    Raises:
        ValueError: two of them were not.
    """
    first: dict[tuple[str, int], tuple[Group, Mapping[str, Any]]] = {}
    for group, outcomes in reported.items():
        for seed, outcome in outcomes.items():
            settings = training_settings(outcome.settings)
            other, expected = first.setdefault((group.task, seed), (group, settings))
            for name in expected.keys() & settings.keys():
                if settings[name] != expected[name]:
                    raise ValueError(
                        f"seed {seed}: {name} is {settings[name]!r} in cells {group} and {expected[name]!r} in "
                        f"cells {other}, but must be the same: delete those that are wrong, and start again"
                    )


def _group(
    plan: Plan,
    progress: Progress,
    group: Group,
    choice: RateChoice | None,
    reported: Mapping[Group, Mapping[int, CellResult]],
) -> dict[str, Any]:
    own = reported[group]
    reference = dataclasses.replace(group, method=plan.config.baseline)
    base = reported[reference]
    values = spread([outcome.reported for outcome in own.values()])
    pairs = [seed for seed in own if seed in base]
    difference = None
    if group != reference:
        difference = dataclasses.asdict(
            paired_difference([own[seed].reported for seed in pairs], [base[seed].reported for seed in pairs])
        )
    parameters = _mean(outcome.parameters for outcome in own.values())
    needed = _mean(outcome.parameters for outcome in base.values())
    unequal = parameters is not None and needed is not None
    return {
        "task": group.task,
        "budget": group.budget,
        "method": group.method,
        "metric": plan.metric(group.task),
        "lower_is_better": plan.lower_is_better(group.task),
        "learning_rate": None if choice is None else choice.learning_rate,
        "search": None if choice is None else {f"{rate:g}": _finite(mean) for rate, mean in choice.means.items()},
        "at_edge": None if choice is None else choice.at_edge,
        "searched": choice is not None and choice.searched,
        "reported": {seed: outcome.reported for seed, outcome in own.items()},
        "mean": values.mean,
        "deviation": values.deviation,
        "difference": difference,
        "parameters": parameters,
        "parameters_of_baseline": needed,
        "parameters_differ": bool(
            unequal and abs(parameters - needed) > max(outcome.widest for outcome in base.values())
        ),
        "seconds": _mean(outcome.seconds for outcome in own.values()),
        "steps": max((outcome.steps for outcome in own.values()), default=None),
        "initial_rank": max((outcome.initial_rank for outcome in own.values()), default=None),
        "mean_ranks": _mean_ranks([outcome.ranks for outcome in own.values()]),
        "missing": list(_missing(plan, progress, group, choice)),
    }


def _missing(plan: Plan, progress: Progress, group: Group, choice: RateChoice | None) -> Iterator[str]:
    """What the group's row lacks, in words."""
    cells = plan.search_cells(group)
    if choice is not None:
        cells = plan.reported_cells(group, choice.learning_rate)
    lacking = False
    for cell in cells:
        outcome, failure = progress.outcome(cell), progress.failure(cell)
        if outcome is None or (choice is not None and outcome.diverged):
            lacking = True
            yield f"{cell}: {failure or 'not run yet'}"
    if choice is None and not lacking:
        yield f"{group}: every learning rate has diverged"


def _cells(plan: Plan, progress: Progress) -> Iterator[dict[str, Any]]:
    for cell in progress.known_cells():
        outcome, failure = progress.outcome(cell), progress.failure(cell)
        yield {
            "folder": str(plan.cell_folder(cell).relative_to(plan.folder)),
            "task": cell.group.task,
            "budget": cell.group.budget,
            "method": cell.group.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "search": None if outcome is None else _finite(outcome.search),
            "reported": None if outcome is None else _finite(outcome.reported),
            "parameters": None if outcome is None else outcome.parameters,
            "seconds": None if outcome is None else _finite(outcome.seconds),
            "ranks": None if outcome is None else outcome.ranks,
            "failure": failure,
            "environment": None if outcome is None else outcome.environment,
        }


def _adjust(groups: Sequence[dict[str, Any]]) -> None:
    """Add the p-values adjusted for all comparisons of the table."""
    tested = [group["difference"] for group in groups if (group["difference"] or {}).get("p_value") is not None]
    for difference, adjusted in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
        difference["p_holm"] = adjusted


def _mean(values: Iterator[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_ranks(ranks: Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {name: fmean(one.get(name, 0) for one in ranks) for name in (ranks[0] if ranks else {})}


def format_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = ["# Comparison", ""]
    for task, budget in {(group["task"], group["budget"]): None for group in results["groups"]}:
        groups = [group for group in results["groups"] if (group["task"], group["budget"]) == (task, budget)]
        parts += [*_table(results, groups), ""]
    parts += [f"- **{name}**: {says}" for name, says in results["methods"].items()]
    parts += ["", *(f"- {note}" for note in _remarks(results)), ""]
    missing = [line for group in results["groups"] for line in group["missing"]]
    if missing:
        parts += ["## Missing", "", *(f"- {' '.join(line.split())}" for line in missing), ""]
    return "\n".join(parts)


def _table(results: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    first, baseline = groups[0], results["config"]["baseline"]
    sense = "lower" if first["lower_is_better"] else "higher"
    head = [
        "method",
        "learning rate",
        f"{first['metric']}, mean ± sd",
        "seeds",
        f"minus {baseline} [{results['confidence']:.0%} CI]",
        "p (Holm)",
        "parameters",
        "training s",
    ]
    lines = [f"## {first['task']}, rank {first['budget']} ({first['metric']}, {sense} is better)", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_row(group, len(results["config"]["seeds"]))) + " |" for group in groups]


def _row(group: Mapping[str, Any], seeds: int) -> list[str]:
    rate, mean = group["learning_rate"], group["mean"]
    edge = f" **({group['at_edge']} of the grid!)**" if group["at_edge"] else ""
    sd = "n/a" if group["deviation"] is None else f"{group['deviation']:.4f}"
    number = len(group["reported"])
    return [
        group["method"],
        "missing" if rate is None else f"{rate:g}{edge}",
        "missing" if mean is None else f"{mean:.4f} ± {sd}",
        str(number) if number == seeds else f"**{number} of {seeds}**",
        *_difference_cells(group["difference"]),
        "" if group["parameters"] is None else f"{group['parameters']:,.0f}{' †' * group['parameters_differ']}",
        "" if group["seconds"] is None else f"{group['seconds']:.0f}",
    ]


def _difference_cells(difference: Mapping[str, Any] | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    if difference["mean"] is None:
        return "n/a", "n/a"
    if difference["low"] is None:
        return f"{difference['mean']:+.4f} [n/a]", "n/a"
    interval = f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return interval, f"{difference['p_value']:.3g} ({difference['p_holm']:.3g})"


def _remarks(results: Mapping[str, Any]) -> Iterator[str]:
    config, groups = results["config"], results["groups"]
    rates = ", ".join(f"{rate:g}" for rate in config["learning_rates"])
    if len(config["learning_rates"]) > 1:
        yield (
            f"The learning rate of every method was chosen from {rates} by the mean over {config['search_seeds']} of "
            "the seeds on the split `search`, which is not the reported one. Figures are of the last step."
        )
    else:
        yield f"The learning rate was not searched: it is {rates} for all methods. Figures are of the last step."
    yield (
        f"Differences are paired by seed; their intervals are Student's, the p-values those of the paired t test. "
        f"{results['comparisons']} comparisons were made: the p-values in brackets are adjusted for that (Holm), the "
        "intervals are not."
    )
    yield (
        f"Parameters are the elements of the saved LoRA factors; gates and singular values are folded in. All adapters "
        f"are scaled by alpha / initial rank = {config['alpha_over_rank']:g}."
    )
    if any(group["parameters_differ"] for group in groups):
        yield f"† differs from {config['baseline']} by more than one component of the widest layer."
    for group in groups:
        if group["at_edge"]:
            yield (
                f"**{group['task']}, rank {group['budget']}, {group['method']}: the learning rate chosen is the "
                f"{group['at_edge']} of the grid. A better one may lie beyond it: widen learning_rates.**"
            )
    yield from results["notes"]
    if len(results["commits"]) > 1:
        yield f"Cells are of several commits: {', '.join(results['commits'])}."


def write_results(plan: Plan, results: Mapping[str, Any]) -> Path:
    """Write both files; returns the path of the table."""
    files.write_json(plan.folder / RESULTS, results)
    table = plan.folder / TABLE
    temporary = table.with_suffix(".md.tmp")
    temporary.write_text(format_table(results), encoding="utf-8")
    temporary.replace(table)
    return table
