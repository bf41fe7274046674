"""The ranks of a run over its events, in the form in which a page draws them: plain values that JSON can hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_dist.page.open_run import OpenRun
from dora_dist.runs.pictures import Rank, rank_grid, short_kinds

MOST_FRAMES = 200
"""Most frames of a map; with more events, the map is thinned."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The map after one event.

    Attributes:
        step: optimizer step of the event; 0 for the start.
        kept: number of components in the whole model.
        final: whether the ranks are fixed from here on.
        ranks: number of components by row and column; None if a block has no such module.
        scores: mean score before the event, by row and column; None if nothing was scored.
    """

    step: int
    kept: int
    final: bool
    ranks: list[list[int | None]]
    scores: list[list[float | None]] | None


@dataclass(frozen=True, kw_only=True)
class RankMap:
    """Ranks by block (row) and kind of module (column), over the events.

    Attributes:
        run: name of the run.
        rows: blocks of the model, in order.
        columns: kinds of modules, in the order in which a block computes.
        most: the highest rank of all frames.
        frames: frames in the order of their steps; empty before the first event.
        note: additional remark; may be empty.
    """

    run: str
    rows: list[str]
    columns: list[str]
    most: int
    frames: list[Frame]
    note: str


def rank_map(run: OpenRun) -> RankMap:
    """The map of a run. If the first event is after step 0, a frame for the start comes first."""
    events = list(run.events)
    if not events:
        return RankMap(run=run.name, rows=[], columns=[], most=0, frames=[], note="")
    rows, kinds, _ = rank_grid(events[0].ranks)

    def frame(step: int, final: bool, ranks: Mapping[str, int], scores: Mapping[str, float] | None) -> Frame:
        return Frame(
            step=step,
            kept=sum(ranks.values()),
            final=final,
            ranks=_grid(ranks, rows, kinds),
            scores=None if scores is None else _grid(_rounded(scores), rows, kinds),
        )

    every = math.ceil(len(events) / MOST_FRAMES)
    chosen = events[::-1][::every][::-1]
    frames = [frame(event.step, event.final, event.ranks, event.scores) for event in chosen]
    if events[0].step > 0:
        frames.insert(0, frame(0, False, dict.fromkeys(events[0].ranks, run.summary["initial_rank"]), None))
    return RankMap(
        run=run.name,
        rows=rows,
        columns=short_kinds(kinds),
        most=max(rank for one in frames for row in one.ranks for rank in row if rank is not None),
        frames=frames,
        note=f"one event of {every} is shown" if every > 1 else "",
    )


def _grid(values: Mapping[str, Rank], rows: Sequence[str], kinds: Sequence[str]) -> list[list[Rank | None]]:
    _, _, grid = rank_grid(values)
    return [[grid.get((row, kind)) for kind in kinds] for row in rows]


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Rounded to four digits, which suffice for display and keep the page small."""
    return {name: float(f"{score:.4g}") for name, score in scores.items()}
