"""Pictures of a run: ranks by layer, losses and components over the steps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dora_dist.console.plot import pyplot, save_picture
from dora_dist.method.layer_names import split_name
from dora_dist.runs.records import evaluation_of, source_names

Rank = TypeVar("Rank", int, float)
"""An int for one run, a float for the mean of several."""

RANK_PICTURE = "ranks.png"


PROGRESS_PICTURE = "progress.png"
MOST_MARKED = 50
"""Most steps in a line for which every step gets a marker."""


@dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """Number of components in the whole model over a run.

    Attributes:
        start: number at the start; None if it is not known yet.
        left: step of an event -> number that remains after it.
        target: number after the last event; None if the budget counts something else.
    """

    start: int | None
    left: Mapping[int, int]
    target: int | None


def rank_grid(ranks: Mapping[str, Rank]) -> tuple[list[str], list[str], dict[tuple[str, str], Rank]]:
    """Blocks in order, kinds in the order of computation, and a mapping (block, kind) -> rank.

    A block's title is its number. If a model has several stacks of blocks (encoder and decoder, a tower and text), the
    title is stack and number. A module outside of all blocks has block ``-``.
    """
    parts = {name: split_name(name) for name in ranks}
    stacks = _short_stacks({stack for stack, number, _ in parts.values() if number is not None}) | {"": ""}
    titles = {
        (stack, number): "-" if number is None else f"{stacks[stack]} {number}".strip()
        for stack, number, _ in parts.values()
    }
    order = sorted(titles, key=lambda block: (block[1] is None, block[0], block[1] or 0))
    kinds = sorted({kind for _, _, kind in parts.values()}, key=_kind_order)
    grid = {(titles[stack, number], kind): ranks[name] for name, (stack, number, kind) in parts.items()}
    return [titles[block] for block in order], kinds, grid


def _short_stacks(stacks: Collection[str]) -> dict[str, str]:
    """Stack name -> the part of it that distinguishes it from the others: ``model.encoder.layers`` -> ``encoder``."""
    paths = {stack: stack.split(".") for stack in sorted(stacks)}
    shortest = min(map(len, paths.values()), default=0)
    first = last = 0
    while first < shortest and len({path[first] for path in paths.values()}) == 1:
        first += 1
    while first + last < shortest and len({path[-1 - last] for path in paths.values()}) == 1:
        last += 1
    return {stack: ".".join(path[first : len(path) - last]) for stack, path in paths.items()}


def _kind_order(kind: str) -> tuple[int, str]:
    """Sort key: the order in which a block of a LLaMA-class model computes."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    last = kind.rsplit(".", 1)[-1]
    return (order.index(last) if last in order else len(order), kind)


def short_kinds(kinds: list[str]) -> list[str]:
    """Last parts of the kinds' names if these are unique; otherwise the whole names."""
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return short if len(set(short)) == len(short) else kinds


def draw_ranks(ranks: Mapping[str, int], initial_rank: int, path: Path | BinaryIO) -> None:
    """Draw a heat map of ranks, layers x module kinds, with the number in every cell."""
    plot = pyplot()
    blocks, kinds, grid = rank_grid(ranks)
    values = [[grid.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
    cell = 0.42 if len(blocks) <= 24 else 0.24
    figure, axes = plot.subplots(figsize=(2.2 + 0.85 * len(kinds), 1.6 + cell * len(blocks)), layout="constrained")
    most = max(initial_rank, *ranks.values())
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=most)
    axes.set_xticks(range(len(kinds)), short_kinds(kinds), rotation=30, ha="right")
    axes.set_yticks(range(len(blocks)), blocks, fontsize=9 if cell > 0.3 else 7)
    axes.set_ylabel("layer")
    axes.set_title(
        f"components kept of {initial_rank}" if most == initial_rank else f"components, {initial_rank} at first"
    )
    for row, block in enumerate(blocks):
        for column, kind in enumerate(kinds):
            rank = grid.get((block, kind))
            if rank is not None:
                colour = "black" if rank > 0.6 * most else "white"
                axes.text(column, row, rank, ha="center", va="center", color=colour, fontsize=9 if cell > 0.3 else 7)
    figure.colorbar(image, ax=axes, label="rank", fraction=0.05, pad=0.02)
    save_picture(figure, path)


def draw_progress(lines: Sequence[Mapping[str, Any]], budget: BudgetCurve, path: Path) -> None:
    """Draw training and held-out loss, and the number of remaining components, over the steps.

    Args:
        lines: lines of ``metrics.jsonl``.
        budget: the run's number of components.
        path: file of the picture.
    """
    plot = pyplot()
    figure, (top, bottom) = plot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    _draw_losses(top, lines, plot)
    steps = [0, *budget.left]
    left = [budget.start, *budget.left.values()]
    last = max([steps[-1], *(line["step"] for line in lines)])
    if budget.start is not None:
        bottom.step([*steps, last], [*left, left[-1]], where="post", color="#228833")
        bottom.plot(steps[1:], left[1:], "o", markersize=3, color="#228833")
        bottom.set_ylim(0, 1.08 * budget.start)
    if budget.target is not None:
        bottom.axhline(budget.target, linestyle=":", color="#777777")
        bottom.annotate(f"target {budget.target:,}", (last, budget.target), ha="right", va="bottom", fontsize=8)
    bottom.set_ylabel("components")
    bottom.set_xlabel("optimizer step")
    bottom.set_xlim(0, 1.02 * max(last, 1))
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.ticklabel_format(style="plain", useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def _draw_losses(axes: Any, lines: Sequence[Mapping[str, Any]], plot: Any) -> None:
    """Training loss, and held-out loss by source. Points have markers, because a line of one point is invisible."""
    trained = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    marker = "o" if len(trained) <= MOST_MARKED else None
    if trained:
        at, losses = [line["step"] for line in trained], [line["loss"] for line in trained]
        axes.plot(at, losses, marker=marker, markersize=3, label="training", color="#4477aa")
    at = [line["step"] for line in evaluations]
    if evaluations:
        axes.plot(at, [line["eval_loss"] for line in evaluations], "o", label="held-out", color="#ee6677")
    names = source_names(evaluation_of(evaluations[-1])) if evaluations else []
    for number, name in enumerate(names):
        losses = [line[f"eval_{name}_loss"] for line in evaluations]
        colour = plot.colormaps["turbo"]((number + 0.5) / len(names))
        axes.plot(at, losses, ".--", linewidth=0.8, markersize=4, color=colour, label=name)
    axes.set_ylabel("loss")
    many = len(axes.lines) > 6
    if axes.lines:
        axes.legend(frameon=False, ncols=2 if many else 1, fontsize=8 if many else None)
