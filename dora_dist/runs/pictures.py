"""Pictures of a run: ranks by layer, losses and components over the steps."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dora_dist.console.plot import pyplot, save_picture
from dora_dist.runs.records import evaluation_of, source_names

Rank = TypeVar("Rank", int, float)
"""Of one run, or the mean of several."""

RANK_PICTURE = "ranks.png"


PROGRESS_PICTURE = "progress.png"


def split_name(name: str) -> tuple[str, str, str]:
    """Stack of blocks, block number and kind of a module: ``model.layers.3.self_attn.q_proj`` ->
    ``("model.layers", "3", "self_attn.q_proj")``.

    Kinds that share a last part (an encoder's ``attention.output.dense`` and ``output.dense``) keep what follows the
    number; a module outside all blocks is block ``-``.
    """
    match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
    return (match[1], match[2], match[3]) if match else ("", "-", name)


def rank_grid(ranks: Mapping[str, Rank]) -> tuple[list[str], list[str], dict[tuple[str, str], Rank]]:
    """Blocks in order, kinds in order of their names' first appearance, and rank by (block, kind).

    A block is known by its number; where a model has several stacks of blocks (encoder and decoder, a tower and text),
    by stack and number.
    """
    parts = {name: split_name(name) for name in ranks}
    stacks = _short_stacks({stack for stack, number, _ in parts.values() if number != "-"}) | {"": ""}
    titles = {(stack, number): f"{stacks[stack]} {number}".strip() for stack, number, _ in parts.values()}
    order = sorted(titles, key=lambda block: (block[1] == "-", block[0], int(block[1]) if block[1] != "-" else 0))
    kinds = sorted({kind for _, _, kind in parts.values()}, key=_kind_order)
    grid = {(titles[stack, number], kind): ranks[name] for name, (stack, number, kind) in parts.items()}
    return [titles[block] for block in order], kinds, grid


def _short_stacks(stacks: Collection[str]) -> dict[str, str]:
    """Name of a stack -> the part of it that the others do not have: ``model.encoder.layers`` -> ``encoder``."""
    paths = {stack: stack.split(".") for stack in sorted(stacks)}
    shortest = min(map(len, paths.values()), default=0)
    first = last = 0
    while first < shortest and len({path[first] for path in paths.values()}) == 1:
        first += 1
    while first + last < shortest and len({path[-1 - last] for path in paths.values()}) == 1:
        last += 1
    return {stack: ".".join(path[first : len(path) - last]) for stack, path in paths.items()}


def _kind_order(kind: str) -> tuple[int, str]:
    """The order in which a block of a LLaMA-class model computes."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    last = kind.rsplit(".", 1)[-1]
    return (order.index(last) if last in order else len(order), kind)


def short_kinds(kinds: list[str]) -> list[str]:
    """Last parts of the kinds' names, where they tell them apart."""
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return short if len(set(short)) == len(short) else kinds


def draw_ranks(ranks: Mapping[str, int], initial_rank: int, path: Path) -> None:
    """Heat map of the final ranks, layers x module kinds, with the number in every cell."""
    plot = pyplot()
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
    save_picture(figure, path)


def draw_progress(lines: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over the steps, and the components left."""
    plot = pyplot()
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
    names = source_names(evaluation_of(evaluations[-1])) if evaluations else []
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
    save_picture(figure, path)
