"""What a run did, from its files alone: a summary to read, and pictures.

``python -m dora_dist.report RUN`` prints the summary and draws the pictures again.
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_dist.console.command import run_command
from dora_dist.runs import records

RANK_PICTURE = "ranks.png"
PROGRESS_PICTURE = "progress.png"
METRIC_TITLES = {
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "matthews": "Matthews",
    "f1": "F1",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
}
"""Metrics beside the loss, in the order in which they are shown."""
SHARES = ("exact_match", "accuracy")
"""Those that are shown in percent."""


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end, adapter included."""
    return (run / records.SUMMARY).is_file()


def finish_run(run: Path) -> str:
    """Draw the pictures, write ``summary.json``, and return the summary as text.

    Raises:
        ValueError: the folder holds no records of a pruned run.
    """
    summary = summarize(run)
    draw_ranks(summary["ranks"], summary["initial_rank"], run / RANK_PICTURE)
    draw_progress(records.read_lines(run / records.METRICS), run / PROGRESS_PICTURE)
    records.write_json(run / records.SUMMARY, summary)
    return format_summary(summary, run)


def summarize(run: Path) -> dict[str, Any]:
    """The figures of a run, read from ``metrics.jsonl``, ``allocation.jsonl`` and ``run.json``."""
    for name in (records.METRICS, records.ALLOCATION, records.RUN):
        if not (run / name).is_file():
            raise ValueError(f"{run} is not the folder of a run that has pruned: it has no {name}")
    lines = records.read_lines(run / records.METRICS)
    events = records.read_events(run / records.ALLOCATION)
    if not events:
        raise ValueError(f"{run / records.ALLOCATION} holds no pruning event yet")
    settings = records.read_json(run / records.RUN)["settings"]
    evaluations = [line for line in lines if "eval_loss" in line]
    last_session = next((line for line in reversed(lines) if "session_seconds" in line), {})
    ranks = events[-1].ranks
    return {
        "steps": lines[-1]["step"] if lines else 0,
        "before": _evaluation(evaluations[0]) if evaluations and evaluations[0]["step"] == 0 else None,
        "after": _evaluation(evaluations[-1]) if evaluations else None,
        "initial_rank": settings["initial rank"],
        "components_at_start": settings["initial rank"] * len(ranks),
        "components_kept": events[-1].num_kept,
        "parameters_kept": events[-1].num_parameters,
        "final_event": events[-1].final,
        "ranks": ranks,
        "session_seconds": last_session.get("session_seconds"),
        "session_tokens": last_session.get("session_tokens"),
        "skipped_steps": sum("skipped" in line for line in lines),
    }


def source_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Held-out sources with figures of their own, in their order."""
    return [name.removesuffix("_loss") for name in evaluation if name.endswith("_loss")]


def _source_lines(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    names = source_names(after)
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        parts = [f"loss {_change(before, after, f'{name}_loss')}"]
        parts += [
            f"{title} {_change(before, after, f'{name}_{metric}')}"
            for metric, title in METRIC_TITLES.items()
            if f"{name}_{metric}" in after
        ]
        lines.append(f"    {name:<{width}}  {', '.join(parts)}  ({after[f'{name}_examples']} examples)")
    return lines


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any], name: str) -> str:
    style = ".1%" if name.endswith(SHARES) else ".4f"
    start = f"{before[name]:{style}} -> " if before else ""
    return f"{start}{after[name]:{style}}"


def _evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def format_summary(summary: Mapping[str, Any], run: Path) -> str:
    """The summary as lines for a person."""
    lines = [f"Run {run}, {summary['steps']} optimizer steps"]
    before, after = summary["before"], summary["after"]
    if after:
        for name, title in {"loss": "held-out loss", **METRIC_TITLES}.items():
            if name in after:
                lines.append(f"  {title:<16} {_change(before, after, name)}  ({after['examples']} examples)")
        lines += _source_lines(before, after)
    kept, start = summary["components_kept"], summary["components_at_start"]
    state = "" if summary["final_event"] else "  (pruning has not ended)"
    parameters = summary["parameters_kept"]
    size = "" if parameters is None else f" of {parameters:,} parameters"
    lines.append(f"  {'components':<16} {start} -> {kept}{size}{state}")
    if summary["session_seconds"]:
        seconds, tokens = summary["session_seconds"], summary["session_tokens"]
        lines.append(f"  {'training time':<16} {seconds:.0f} s, {tokens / seconds:.0f} tokens/s")
    lines += ["", *_rank_table(summary["ranks"]), ""]
    files = {
        "adapter": run / "adapter",
        "metrics": run / records.METRICS,
        "rank picture": run / RANK_PICTURE,
        "progress picture": run / PROGRESS_PICTURE,
    }
    lines += [f"  {title:<16} {path}" for title, path in files.items() if path.exists()]
    return "\n".join(lines)


def split_name(name: str) -> tuple[str, str]:
    """Block number and kind of a module: ``model.layers.3.self_attn.q_proj`` -> ``("3", "q_proj")``.

    Kinds that share a last part (an encoder's ``attention.output.dense`` and ``output.dense``) keep what follows the
    number; a module outside all blocks is block ``-``.
    """
    match = re.search(r"\.(\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else ("-", name)


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Blocks in order, kinds in order of their names' first appearance, and rank by (block, kind)."""
    grid = {split_name(name): rank for name, rank in ranks.items()}
    blocks = sorted({block for block, _ in grid}, key=lambda block: (block == "-", int(block) if block != "-" else 0))
    kinds = sorted({kind for _, kind in grid}, key=_kind_order)
    return blocks, kinds, grid


def _kind_order(kind: str) -> tuple[int, str]:
    """The order in which a block of a LLaMA-class model computes."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    last = kind.rsplit(".", 1)[-1]
    return (order.index(last) if last in order else len(order), kind)


def short_kinds(kinds: list[str]) -> list[str]:
    """Last parts of the kinds' names, where they tell them apart."""
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return short if len(set(short)) == len(short) else kinds


def _rank_table(ranks: Mapping[str, int]) -> list[str]:
    blocks, kinds, grid = rank_grid(ranks)
    titles = short_kinds(kinds)
    widths = [max(len(title), 4) for title in titles]
    lines = ["  rank by layer  " + "  ".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True)) + "   mean"]
    for block in blocks:
        cells = [grid.get((block, kind)) for kind in kinds]
        present = [cell for cell in cells if cell is not None]
        row = "  ".join(f"{'' if cell is None else cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"  {block:>13}  {row}  {statistics.mean(present):5.1f}")
    by_kind: dict[str, list[int]] = defaultdict(list)
    for (_, kind), rank in grid.items():
        by_kind[kind].append(rank)
    means = [statistics.mean(by_kind[kind]) for kind in kinds]
    row = "  ".join(f"{mean:>{w}.1f}" for mean, w in zip(means, widths, strict=True))
    lines.append(f"  {'mean':>13}  {row}  {statistics.mean(ranks.values()):5.1f}")
    return lines


def draw_ranks(ranks: Mapping[str, int], initial_rank: int, path: Path) -> None:
    """Heat map of the final ranks, layers x module kinds, with the number in every cell."""
    plot = _pyplot()
    blocks, kinds, grid = rank_grid(ranks)
    values = [[grid.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
    cell = 0.42 if len(blocks) <= 24 else 0.24
    figure, axes = plot.subplots(figsize=(2.2 + 0.85 * len(kinds), 1.6 + cell * len(blocks)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=initial_rank)
    axes.set_xticks(range(len(kinds)), short_kinds(kinds), rotation=30, ha="right")
    axes.set_yticks(range(len(blocks)), blocks, fontsize=9 if cell > 0.3 else 7)
    axes.set_ylabel("layer")
    axes.set_title(f"components kept of {initial_rank}")
    for row, block in enumerate(blocks):
        for column, kind in enumerate(kinds):
            rank = grid.get((block, kind))
            if rank is not None:
                colour = "black" if rank > 0.6 * initial_rank else "white"
                axes.text(column, row, rank, ha="center", va="center", color=colour, fontsize=9 if cell > 0.3 else 7)
    figure.colorbar(image, ax=axes, label="rank", fraction=0.05, pad=0.02)
    _save(figure, path)


def draw_progress(lines: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over the steps, and the components left."""
    plot = _pyplot()
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    figure, (top, bottom) = plot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    top.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training", color="#4477aa")
    top.plot(
        [line["step"] for line in evaluations],
        [line["eval_loss"] for line in evaluations],
        "o",
        label="held-out",
        color="#ee6677",
    )
    names = source_names(_evaluation(evaluations[-1])) if evaluations else []
    for number, name in enumerate(names):
        losses = [line[f"eval_{name}_loss"] for line in evaluations]
        colour = plot.colormaps["turbo"]((number + 0.5) / len(names))
        at = [line["step"] for line in evaluations]
        top.plot(at, losses, ".--", linewidth=0.8, markersize=4, color=colour, label=name)
    top.set_ylabel("loss")
    top.set_yscale("log")
    top.legend(frameon=False, ncols=2 if len(top.lines) > 6 else 1, fontsize=8 if len(top.lines) > 6 else None)
    bottom.step([line["step"] for line in steps], [line["components"] for line in steps], where="post", color="#228833")
    bottom.set_ylabel("components")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimizer step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140)
    _pyplot().close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dora_dist.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run (output_dir of its configuration)")
    print(finish_run(parser.parse_args().run))


if __name__ == "__main__":
    run_command(main)
