"""Draws the picture of a result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from dora_dist.config.pruning import GROW, MOVE
from dora_dist.console.plot import pyplot, save_picture
from dora_dist.planted.experiment import REPORTED, chosen_cells
from dora_dist.planted.options import FIXED, ORACLE, UNIFORM, Options

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = {
    UNIFORM: "#777777",
    "frobenius": "#D55E00",
    "magnitude": "#56B4E9",
    "squared_magnitude": "#0072B2",
    "gate_sensitivity": "#009E73",
    "random": "#CC79A7",
    MOVE: "#E69F00",
    GROW: "#F0E442",
    ORACLE: "#000000",
}
MARKERS = {
    UNIFORM: "s",
    "frobenius": "o",
    "magnitude": "v",
    "squared_magnitude": "^",
    "gate_sensitivity": "D",
    "random": "X",
    MOVE: "P",
    GROW: "h",
    ORACLE: "*",
}


def draw(result: Mapping[str, Any], options: Options, path: Path) -> None:
    """Draw one row of panels for every pattern: divergence, overlap, kept and planted ranks, scores by planted rank."""
    figure, axes = pyplot().subplots(
        len(options.patterns), 4, figsize=(17, 1 + 3.3 * len(options.patterns)), layout="constrained", squeeze=False
    )
    for line, pattern in zip(axes, options.patterns, strict=True):
        rows = {row["method"]: row for row in result["rows"] if row["pattern"] == pattern}
        truths = {truth["seed"]: truth for truth in result["truths"] if truth["pattern"] == pattern}
        cells = {method: chosen_cells(result, pattern, method, options) for method in options.methods}
        _dots(line[0], {m: [c["divergence"][REPORTED] for c in own] for m, own in cells.items()})
        line[0].set_xlim(left=0)
        line[0].set_title(f"{pattern}: divergence at the end (bar: mean of the seeds)", fontsize=10)
        line[0].set_xlabel("KL(teacher || student), nats a token")
        _dots(line[1], {m: [_overlap(c, truths) for c in own] for m, own in cells.items()})
        line[1].axvline(rows[UNIFORM]["overlap"]["mean"], color=COLORS[UNIFORM], linewidth=0.8, linestyle="--")
        line[1].set_xlim(0, 1.03)
        line[1].set_yticklabels([])
        line[1].set_title("budget overlap (dashed: uniform's)", fontsize=10)
        line[1].set_xlabel("sum min(kept, planted) / sum planted")
        for method, own in cells.items():
            _line(line[2], method, _by_planted(own, truths, lambda cell: cell["kept"]))
            if method not in FIXED:
                _line(line[3], method, _by_planted(own, truths, _relative_scores))
        highest = max(rank for truth in truths.values() for rank in truth["planted"])
        line[2].plot([0, highest], [0, highest], color="#bbbbbb", linewidth=4, zorder=0)
        line[2].set_title("kept rank (grey: the truth)", fontsize=10)
        line[2].set_xlabel("planted rank")
        line[3].axhline(1, color="#bbbbbb", linewidth=4, zorder=0)
        line[3].set_yscale("log")
        line[3].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        line[3].yaxis.set_major_formatter("{x:g}")
        line[3].yaxis.set_minor_formatter(NullFormatter())
        line[3].set_title("a layer's mean score at the final event / all layers'", fontsize=10)
        line[3].set_xlabel("planted rank")
        for axis in line:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    base = options.model.name if options.model else "random weights"
    figure.suptitle(
        f"Planted ranks, base: {base}, target rank {options.target_rank}, {options.steps} steps, {options.seeds} seeds",
        fontsize=12,
    )
    save_picture(figure, path, dpi=110)


def _dots(axis: Axes, values: Mapping[str, Sequence[float]]) -> None:
    for height, (method, own) in enumerate(values.items()):
        axis.plot(own, [height] * len(own), MARKERS[method], color=COLORS[method], alpha=0.55, markersize=6)
        axis.plot([mean(own)] * 2, [height - 0.3, height + 0.3], color=COLORS[method], linewidth=2)
    axis.set_yticks(range(len(values)), list(values))
    axis.set_ylim(len(values) - 0.5, -0.5)


def _line(axis: Axes, method: str, points: Mapping[int, float]) -> None:
    axis.plot(
        list(points), list(points.values()), marker=MARKERS[method], color=COLORS[method], label=method, linewidth=1.3,
        markersize=6,
    )  # fmt: skip


def _overlap(cell: Mapping[str, Any], truths: Mapping[int, Mapping[str, Any]]) -> float:
    planted = truths[cell["seed"]]["planted"]
    shared: float = sum(map(min, cell["kept"], planted)) / sum(planted)
    return shared


def _by_planted(
    cells: Sequence[Mapping[str, Any]], truths: Mapping[int, Mapping[str, Any]], values: Any
) -> dict[int, float]:
    """Planted rank -> mean of a layer's value over layers and seeds."""
    groups: dict[int, list[float]] = {}
    for cell in cells:
        for rank, value in zip(truths[cell["seed"]]["planted"], values(cell), strict=True):
            groups.setdefault(rank, []).append(value)
    return {rank: mean(groups[rank]) for rank in sorted(groups)}


def _relative_scores(cell: Mapping[str, Any]) -> list[float]:
    scores = cell["at_final_event"]["score"]
    return [score / mean(scores) for score in scores]
