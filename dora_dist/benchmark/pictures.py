"""Draws pictures of measurements."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dora_dist.benchmark.options import ADALORA, DYNAMIC, FLOOR, LORA, PRUNED
from dora_dist.console.plot import pyplot, save_picture

COLORS = {FLOOR: "#777777", LORA: "#b2182b", ADALORA: "#ef8a62", DYNAMIC: "#2166ac", PRUNED: "#1b7837"}
MARKERS = {FLOOR: "|", LORA: "s", ADALORA: "D", DYNAMIC: "o", PRUNED: "^"}
AXES = {"layers": "decoder layers", "hidden": "width", "rank": "initial rank of a layer", "world": "ranks (processes)"}


def draw_comparison(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw step time and peak memory of all contestants, as ratios to PEFT's LoRA, by shape."""
    names = list(records[0]["contestants"])
    figure, axes = pyplot().subplots(
        1, 2, figsize=(13, 1.8 + 0.75 * len(records)), layout="constrained", sharey=True, squeeze=True
    )
    for axis, key, label in (
        (axes[0], "time_ratio", "step time / that of PEFT's LoRA\n(median of paired ratios; line: quartiles)"),
        (axes[1], "memory_ratio", "peak memory / that of PEFT's LoRA"),
    ):
        for number, name in enumerate(names):
            _draw_ratios(axis, records, name, key, (number - (len(names) - 1) / 2) * 0.15)
        axis.axvline(1, color=COLORS[LORA], linewidth=0.7, alpha=0.6)
        for row in range(len(records) - 1):
            axis.axhline(row + 0.5, color="#dddddd", linewidth=0.7)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(records)), [row_label(record) for record in records])
    axes[0].set_ylim(len(records) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=11)
    save_picture(figure, path, dpi=130)


def row_label(record: Mapping[str, Any]) -> str:
    """Label of a comparison: its shape, checkpointing and dropout."""
    dropout = f", dropout {record['dropout']:g}" if record["dropout"] else ""
    return f"{record['shape']}\ncheckpointing {'on' if record['checkpointing'] else 'off'}{dropout}"


def _draw_ratios(axis: Axes, records: Sequence[Mapping[str, Any]], name: str, key: str, shift: float) -> None:
    ratios = [record["contestants"][name][key] for record in records]
    middle = [ratio["median"] if isinstance(ratio, dict) else ratio for ratio in ratios]
    low, high = (
        [abs(ratio[side] - ratio["median"]) if isinstance(ratio, dict) else 0.0 for ratio in ratios]
        for side in ("lower_quartile", "upper_quartile")
    )
    heights = [row + shift for row in range(len(records))]
    axis.errorbar(
        middle,
        heights,
        xerr=[low, high],
        fmt=MARKERS[name],
        color=COLORS[name],
        label=name,
        markersize=6,
        markeredgewidth=2 if MARKERS[name] == "|" else 0,
        elinewidth=1.4,
    )
    for x, y, extent in zip(middle, heights, high, strict=True):
        axis.annotate(
            f"{x:.2f}", (x + extent, y), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center",
            color=COLORS[name],
        )  # fmt: skip


def draw_growth(record: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw step time (above) and the adapter's share of it (below) along each axis."""
    points = record["points"]
    figure, axes = pyplot().subplots(2, len(points), figsize=(4 * len(points), 7), layout="constrained", sharex="col")
    for (upper, lower), (name, along) in zip(axes.T, points.items(), strict=True):
        values = [point["value"] for point in along]
        for contestant in along[0]["contestants"]:
            figures = [point["contestants"][contestant] for point in along]
            _draw_line(upper, values, [one["seconds"] for one in figures], contestant, 1e3)
            if "share" in figures[0]:
                _draw_line(lower, values, [one["share"] for one in figures], contestant, 100)
        fixed = [f"{AXES[key]} {along[0][key]}" for key in ("layers", "hidden", "rank") if key != name]
        upper.set_title("\n".join([f"against {AXES[name]}", ", ".join(fixed)]), fontsize=9)
        lower.set_xlabel(AXES[name])
        upper.set_ylim(bottom=0)
        lower.axhline(0, color="grey", linewidth=0.7)
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("step, ms")
    axes[1][0].set_ylabel("adapter's share of the step, %\n(step - floor) / step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=11)
    save_picture(figure, path, dpi=130)


def _draw_line(
    axis: Axes, values: Sequence[int], spreads: Sequence[Mapping[str, float]], name: str, unit: float
) -> None:
    middle, low, high = (
        [unit * spread[side] for spread in spreads] for side in ("median", "lower_quartile", "upper_quartile")
    )
    axis.plot(
        values, middle, color=COLORS[name], marker="." if name == FLOOR else MARKERS[name], markersize=5, label=name
    )
    axis.fill_between(values, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
