"""The picture of ``agreement_scale.py``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dora_dist.console.plot import pyplot, save_picture

COLORS = {"8B": "#1b7837", "70B": "#2166ac", "405B": "#b2182b"}
READERS = {
    "base_read_by_every_rank": ("16 bit, read by every rank (today)", "-", "o"),
    "base_read_by_every_node": ("16 bit, read once a node", "--", "s"),
    "base_in_4_bits_read_by_every_node": ("4 bit, read once a node", ":", "^"),
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Seconds of events, of the question of every step, and of reading the base, over the number of ranks."""
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    _draw_events(axes[0], result["table"])
    _draw_steps(axes[1], result["table"])
    _draw_reading(axes[2], result["start_up"])
    for axis in axes:
        ranks = sorted({row["ranks"] for row in result["table"]})
        axis.set_xticks(ranks, [f"{n:,}" for n in ranks])
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_xlabel("ranks")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Modelled, not run: constants of GPUs, networks and file systems are assumptions (docs/scale.md)")
    save_picture(figure, path, dpi=130)


def _draw_events(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for shape, color in COLORS.items():
        chosen = [row for row in rows if row["shape"] == shape and row["adapter"] == "float32"]
        for start, style in (("good", "-"), ("bad", "--")):
            line = [row for row in chosen if row["network"].startswith(start)]
            axis.plot(
                [row["ranks"] for row in line],
                [row["event_seconds"] for row in line],
                style,
                color=color,
                marker="o",
                markersize=4,
                label=f"{shape}, {start} network",
            )
        line = [row for row in chosen if row["network"].startswith("good")]
        local = [row["event_parts"]["hash"] + row["event_parts"]["copy to host"] for row in line]
        axis.plot([row["ranks"] for row in line], local, color=color, linewidth=5, alpha=0.2)
    axis.set_ylabel("seconds")
    axis.set_title("One pruning event, float32 adapter\n(broad lines: copying and hashing alone)", fontsize=10)
    axis.legend(fontsize=8, frameon=False, handlelength=4, ncols=2, loc="upper left")
    axis.set_ylim(top=axis.get_ylim()[1] * 6)


def _draw_steps(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for shape, color in COLORS.items():
        for start, style in (("good", "-"), ("bad", "--")):
            line = [
                row
                for row in rows
                if row["shape"] == shape and row["adapter"] == "float32" and row["network"].startswith(start)
            ]
            share = [100 * (row["event_share_at_interval"] + row["any_share_of_step"]) for row in line]
            ranks = [row["ranks"] for row in line]
            axis.plot(ranks, share, style, color=color, marker="o", markersize=4, label=f"{shape}, {start} network")
    axis.set_ylabel("% of training time")
    axis.set_title("Agreement as a share of training:\nan event every 100 steps, and one flag every step", fontsize=10)
    axis.legend(fontsize=8, frameon=False, handlelength=4, ncols=2, loc="upper left")
    axis.set_ylim(top=axis.get_ylim()[1] * 6)


def _draw_reading(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for name, (label, style, marker) in READERS.items():
        for shape in ("8B", "70B"):
            line = [row for row in rows if row["shape"] == shape and row["file_system"] == "50 GB/s"]
            axis.plot(
                [row["ranks"] for row in line],
                [row[name] for row in line],
                style,
                color=COLORS[shape],
                marker=marker,
                markersize=4,
                label=f"{shape}, {label}",
            )
    for seconds, label in ((60, "1 min"), (3600, "1 h")):
        axis.axhline(seconds, color="grey", linewidth=0.7)
        axis.text(1.01, seconds, label, fontsize=8, color="grey", va="center", transform=axis.get_yaxis_transform())
    axis.set_ylabel("seconds")
    axis.set_title("Start-up: reading the frozen base\nfrom 50 GB/s (2 GB/s for one reader)", fontsize=10)
    axis.legend(fontsize=7.5, frameon=False, handlelength=4, loc="upper left")
    axis.set_ylim(top=axis.get_ylim()[1] * 30)
