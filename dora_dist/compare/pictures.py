"""Draws the pictures of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dora_dist.compare.results import ComparisonResults, GroupResult
from dora_dist.console.plot import pyplot, save_picture
from dora_dist.runs.pictures import rank_grid, short_kinds

COMPARISON = "comparison.png"
RANKS = "ranks.png"
# Okabe and Ito's colours, which colour-blind people can distinguish.
BETTER, WORSE, UNDECIDED, BASELINE = "#0072B2", "#D55E00", "#666666", "#000000"
MOST_NUMBERED = 400
"""Most cells of a rank map that show their number."""


def draw_comparison(results: ComparisonResults, path: Path) -> None:
    """Draw one dot per seed, and the paired difference from the baseline, for every task and budget."""
    panels = results.by_task_and_budget()
    heights = [0.9 + 0.34 * len(groups) for groups in panels]
    figure, axes = pyplot().subplots(
        len(panels), 2, figsize=(11.5, 1.0 + sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    for (left, right), groups in zip(axes, panels, strict=True):
        _draw_values(left, groups, results.config.baseline)
        _draw_differences(right, groups, results)
    figure.suptitle(
        f"Every dot is a seed, every bar a mean. Right: paired by seed, with the {results.confidence:.0%} "
        "confidence interval;\nblue: better than the baseline, orange: worse, grey: the interval contains 0"
        f"{_marks(results)}",
        fontsize=10,
    )
    save_picture(figure, path)


def _draw_values(axis: Axes, groups: Sequence[GroupResult], baseline: str) -> None:
    for row, group in enumerate(groups):
        values = list(group.reported.values())
        colour = _colour(group, baseline)
        axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        if group.mean is not None:
            axis.plot([group.mean], [row], "|", color=colour, markersize=15, markeredgewidth=2)
    first = groups[0]
    arrow = "lower is better" if first.lower_is_better else "higher is better"
    axis.set_title(f"{first.task}, rank {first.budget}", loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(f"{first.metric} ({arrow})")
    axis.set_yticks(range(len(groups)), [_label(group) for group in groups])
    _finish(axis, len(groups))


def _label(group: GroupResult) -> str:
    marks = " †" * group.parameters_differ
    if group.learning_rate is None:
        return f"{group.method} (missing)"
    edge = "!" if group.at_edge else ""
    return f"{group.method}{marks}  (lr {group.learning_rate:g}{edge})"


def _marks(results: ComparisonResults) -> str:
    """Explanation of the marks behind names, if any are used."""
    edge = "; ! rate at the edge of the grid" if any(group.at_edge for group in results.groups) else ""
    parameters = "; † other number of parameters" if any(group.parameters_differ for group in results.groups) else ""
    return edge + parameters


def _draw_differences(axis: Axes, groups: Sequence[GroupResult], results: ComparisonResults) -> None:
    baseline = results.config.baseline
    axis.axvline(0, color=BASELINE, linewidth=0.9)
    for row, group in enumerate(groups):
        difference = group.difference
        if difference is None or difference.mean is None:
            continue
        colour = _colour(group, baseline)
        if difference.low is not None and difference.high is not None:
            axis.plot([difference.low, difference.high], [row, row], "-", color=colour, linewidth=2)
        axis.plot([difference.mean], [row], "D", color=colour, markersize=5.5)
    axis.set_xlabel(f"difference from {baseline}")
    axis.set_yticks(range(len(groups)), [])
    axis.margins(x=0.12)
    _finish(axis, len(groups))


def _colour(group: GroupResult, baseline: str) -> str:
    difference = group.difference
    if group.method == baseline:
        return BASELINE
    if difference is None or difference.mean is None or difference.low is None or difference.high is None:
        return UNDECIDED
    if difference.low <= 0 <= difference.high:
        return UNDECIDED
    return BETTER if (difference.mean < 0) == group.lower_is_better else WORSE


def _finish(axis: Axes, rows: int) -> None:
    axis.set_ylim(rows - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw_rank_maps(results: ComparisonResults, path: Path) -> None:
    """Draw mean final ranks, layers x module kinds: one column per method, one row per task and budget."""
    panels = results.by_task_and_budget()
    known = [group for groups in panels for group in groups if group.mean_ranks]
    if not known:
        return
    blocks, kinds, _ = rank_grid(known[0].mean_ranks)
    columns = max(map(len, panels))
    size = (0.9 + columns * (0.5 + 0.36 * len(kinds)), 0.6 + len(panels) * (1.35 + 0.24 * len(blocks)))
    figure, axes = pyplot().subplots(len(panels), columns, figsize=size, layout="constrained", squeeze=False)
    for row, groups in zip(axes, panels, strict=True):
        top = max((max(group.mean_ranks.values()) for group in groups if group.mean_ranks), default=1)
        image = None
        for axis, group in zip(row, groups, strict=True):
            image = _draw_map(axis, group, top) or image
        row[0].set_ylabel(f"{groups[0].task}, rank {groups[0].budget}\nlayer")
        if image is not None:
            figure.colorbar(image, ax=row.tolist(), label="mean rank", fraction=0.02, pad=0.01)
    save_picture(figure, path)


def _draw_map(axis: Axes, group: GroupResult, top: float) -> Any:
    axis.set_title(group.method, fontsize=9)
    if not group.mean_ranks:
        axis.set_axis_off()
        return None
    blocks, kinds, grid = rank_grid(group.mean_ranks)
    values = [[grid.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    names = [kind.removesuffix("_proj") for kind in short_kinds(kinds)]
    axis.set_xticks(range(len(kinds)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    if len(blocks) * len(kinds) <= MOST_NUMBERED:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > 0.6 * top else "white"
                axis.text(
                    column, row, f"{value:.1f}".removesuffix(".0"), ha="center", va="center", color=colour, fontsize=6
                )
    return image
