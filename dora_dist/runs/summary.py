"""Summarizes a run from its files alone."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.config.pruning import PRUNE
from dora_dist.config.tasks import METRICS, Metric
from dora_dist.console import files
from dora_dist.runs import claim, records
from dora_dist.runs.pictures import (
    PROGRESS_PICTURE,
    RANK_PICTURE,
    BudgetCurve,
    draw_progress,
    draw_ranks,
    rank_grid,
    short_kinds,
)
from dora_dist.runs.records import evaluation_of, source_names
from dora_dist.runs.speed import TrainingTime
from dora_dist.runs.task_figures import latest_figures, table_of


def is_finished(run: Path) -> bool:
    """Whether a run has ended and written its adapter."""
    return (run / records.SUMMARY).is_file()


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        text: the state in words, to follow the run's name.
        alive: whether the run is going on.
        ended: whether the run has come to its end.
    """

    text: str
    alive: bool = False
    ended: bool = False


def state_of(run: Path, summary: Mapping[str, Any]) -> RunState:
    """The state of a run, from its folder.

    Args:
        run: the run's folder.
        summary: the run's :func:`summarize`.
    """
    here, last = f"step {summary['steps']:,}", f"{records.read_fingerprint(run).num_steps:,}"
    if is_finished(run):
        return RunState(f"ended, at {here} of {last}", ended=True)
    failure, since = records.read_failure(run), claim.held_since(run)
    # A failure before the claim is that of an earlier start, from which this one is still resuming.
    if since is not None and (failure is None or failure["when"] < since):
        return RunState(f"is running, at {here} of {last}", alive=True)
    again = "Start the same command again to resume"
    if failure is None:
        return RunState(f"stopped at {here} of {last} without a word (killed?). {again}")
    step = failure.get("step")
    at = "" if step is None else f" at step {step:,} of {last}" if step else " before its first step"
    end = "was stopped" if failure.get("stopped") else "failed"
    text = f"{end}{at}: {failure['error'].rstrip('.')}"
    return RunState(text if "to resume" in text else f"{text}. {again}")


def finish_run(run: Path) -> str:
    """Draw the pictures, write ``summary.json``, and return the summary as text.

    Raises:
        ValueError: the folder holds no records of a pruned run.
    """
    summary = summarize(run)
    if not summary["ranks"]:
        raise ValueError(f"{run / records.ALLOCATION} holds no pruning event yet")
    _draw(run, summary)
    files.write_json(run / records.SUMMARY, summary)
    return format_summary(summary, run)


def report(run: Path) -> str:
    """Draw the pictures of the run so far, and return the summary as text. The run may still be active: this writes
    nothing that marks a run as finished.

    Raises:
        ValueError: the folder is not a run's folder.
    """
    summary = summarize(run)
    _draw(run, summary)
    figures = latest_figures(run)
    text = format_summary(summary, run, state_of(run, summary))
    return "\n\n".join([text, *([table_of(figures)] if figures else [])])


def _draw(run: Path, summary: Mapping[str, Any]) -> None:
    if summary["ranks"]:
        draw_ranks(summary["ranks"], summary["initial_rank"], run / RANK_PICTURE)
    draw_progress(records.read_metrics(run), budget_of(run, summary), run / PROGRESS_PICTURE)


def budget_of(run: Path, summary: Mapping[str, Any]) -> BudgetCurve:
    """Number of components of the whole model over a run, given the run's :func:`summarize`."""
    fingerprint = records.read_fingerprint(run)
    events = records.read_events(run / records.ALLOCATION)
    pruned_by_number = (
        fingerprint.pruning.get("rule", PRUNE) == PRUNE
        and fingerprint.pruning.get("budget_unit", "components") == "components"
    )
    target = fingerprint.adapter.get("target_rank") if pruned_by_number else None
    return BudgetCurve(
        start=summary["components_at_start"],
        left={event.step: event.num_kept for event in events},
        target=target * len(summary["ranks"]) if target is not None and events else None,
    )


def summarize(run: Path) -> dict[str, Any]:
    """A run's figures, read from ``metrics.jsonl``, ``allocation.jsonl`` and ``run.json``.

    Raises:
        ValueError: the folder is not a run's folder.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}: give the output_dir of a run")
    if not (run / records.RUN).is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no {records.RUN}; give the output_dir of a run")
    # Line by line: every checkpoint has a summary in its card, and a long run has many lines.
    evaluations, skipped = [], 0
    step, unpruned = 0, None
    best: Mapping[str, Any] | None = None
    time = TrainingTime()
    for line in records.each_metric(run):
        step = line["step"]
        skipped += "skipped" in line
        if "eval_loss" in line:
            evaluations.append(line)
        if records.BEST_STEP in line:
            best = line
        time.add(line)
        # Before the first event nothing has been pruned.
        if unpruned is None:
            unpruned = line.get("components")
    events = records.read_events(run / records.ALLOCATION)
    # What was measured of the adapter that the run has ended with.
    last = [line for line in evaluations if best is None or line["step"] == best[records.BEST_STEP]]
    ranks = events[-1].ranks if events else {}
    fixed = bool(events) and events[0].step == 0
    initial_rank = max(ranks.values()) if fixed else records.read_fingerprint(run).initial_rank
    at_start = events[0].num_kept if fixed else initial_rank * len(ranks) if events else unpruned
    return {
        "steps": step,
        # The only evaluation is what there is so far, not a change.
        "before": evaluation_of(evaluations[0]) if len(evaluations) > 1 and evaluations[0]["step"] == 0 else None,
        "after": evaluation_of(last[-1]) if last else None,
        "best": None if best is None else {"step": best[records.BEST_STEP], "figure": best["best_figure"]},
        "initial_rank": initial_rank,
        "components_at_start": at_start,
        "components_kept": events[-1].num_kept if events else unpruned,
        "parameters_kept": events[-1].num_parameters if events else None,
        "final_event": bool(events) and events[-1].final,
        "ranks": ranks,
        "planned": events[-1].planned if events else None,
        "left_out": files.read_json(run / records.RUN).get("left_out"),
        "training_seconds": time.seconds or None,
        "training_tokens": round(time.tokens) if time.tokens else None,
        "skipped_steps": skipped,
    }


def _source_lines(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    names = source_names(after)
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        parts = [
            f"{metric.title} {change(before, after, f'{name}_{key}', metric.style)}"
            for key, metric in {"loss": Metric("loss"), **METRICS}.items()
            if f"{name}_{key}" in after
        ]
        lines.append(f"    {name:<{width}}  {', '.join(parts)}  ({after[f'{name}_examples']} examples)")
    return lines


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any], name: str, style: str) -> str:
    """A held-out figure before and after training; only after training if it was not measured before."""
    start = f"{before[name]:{style}} -> " if before and name in before else ""
    return f"{start}{after[name]:{style}}"


def format_summary(summary: Mapping[str, Any], run: Path, state: RunState | None = None) -> str:
    """The summary in readable lines.

    Args:
        summary: the run's :func:`summarize`.
        run: the run's folder.
        state: the run's state; shown unless the run has ended.
    """
    lines = [f"Run {run}, {summary['steps']} optimizer steps"]
    if state is not None and not state.ended:
        lines.append(f"  {'state':<16} {state.text}")
    before, after = summary["before"], summary["after"]
    if after:
        for name, metric in {"loss": Metric("held-out loss"), **METRICS}.items():
            if name in after:
                figures = change(before, after, name, metric.style)
                lines.append(f"  {metric.title:<16} {figures}  ({after['examples']} examples)")
        lines += _source_lines(before, after)
    if best := summary["best"]:
        lines.append(f"  {'best checkpoint':<16} of step {best['step']}, by {best['figure']}: its adapter is the run's")
    kept, start = summary["components_kept"], summary["components_at_start"]
    pruning = "" if summary["final_event"] else "  (pruning has not ended)"
    parameters = summary["parameters_kept"]
    size = "" if parameters is None else f", which have {parameters:,} parameters"
    if start is not None:
        lines.append(f"  {'components':<16} {start} -> {kept}{size}{pruning}")
    if planned := summary["planned"]:
        chosen = [rank for rank in planned.values() if rank]
        lines.append(
            f"  {'planned':<16} {sum(chosen)} components for the {len(chosen)} of {len(planned)} modules that stayed: "
            f"adapter.ranks {run / records.PLAN} trains them"
        )
    if summary["left_out"]:
        lines.append(f"  {'not adapted':<16} {summary['left_out']}")
    if seconds := summary["training_seconds"]:
        speed = f", {tokens / seconds:.0f} tokens/s" if (tokens := summary["training_tokens"]) else ""
        lines.append(f"  {'training time':<16} {seconds:.0f} s{speed}")
    lines += ["", *rank_table(summary["ranks"]), ""] if summary["ranks"] else [""]
    files = {
        "adapter": run / "adapter",
        "plan of ranks": run / records.PLAN,
        "metrics": run / records.METRICS,
        "rank picture": run / RANK_PICTURE,
        "progress picture": run / PROGRESS_PICTURE,
    }
    lines += [f"  {title:<16} {path}" for title, path in files.items() if path.exists()]
    return "\n".join(lines)


def rank_table(ranks: Mapping[str, int]) -> list[str]:
    """Table of ranks by layer and kind of module, with means, as lines."""
    blocks, kinds, grid = rank_grid(ranks)
    titles = short_kinds(kinds)
    widths = [max(len(title), 4) for title in titles]
    width = max(13, *map(len, blocks))
    lines = [
        f"  {'rank by layer':>{width}}  "
        + "  ".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))
        + "   mean"
    ]
    for block in blocks:
        cells = [grid.get((block, kind)) for kind in kinds]
        present = [cell for cell in cells if cell is not None]
        row = "  ".join(f"{'' if cell is None else cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"  {block:>{width}}  {row}  {statistics.mean(present):5.1f}")
    by_kind: dict[str, list[int]] = defaultdict(list)
    for (_, kind), rank in grid.items():
        by_kind[kind].append(rank)
    means = [statistics.mean(by_kind[kind]) for kind in kinds]
    row = "  ".join(f"{mean:>{w}.1f}" for mean, w in zip(means, widths, strict=True))
    lines.append(f"  {'mean':>{width}}  {row}  {statistics.mean(ranks.values()):5.1f}")
    return lines
