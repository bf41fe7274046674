"""Figures over the steps, in the form in which a page draws them: plain values that JSON can hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dora_dist.config.tasks import METRICS, Metric
from dora_dist.console.text import GIB
from dora_dist.page.open_run import OpenRun
from dora_dist.runs.records import evaluation_of, source_names

MOST_POINTS = 1000
"""Most points of a curve; a longer one is thinned. An ordinary screen is not wider."""
HELD_OUT = {"loss": Metric("held-out loss"), **METRICS}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure of one run over its steps.

    Attributes:
        name: name in the legend.
        colour: number of its colour; with several runs, a run has the same colour in all charts.
        dashed: whether it is a reference line.
        steps: optimizer steps.
        values: values at these steps; None if a value is not finite, which leaves a gap.
    """

    name: str
    colour: int
    dashed: bool
    steps: list[int]
    values: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves in one chart.

    Attributes:
        title: title of the chart.
        unit: unit of the values; empty for a plain number.
        stepped: whether a value holds until the next one, instead of being joined to it by a line.
        curves: at least one curve.
        note: additional remark; may be empty.
    """

    title: str
    unit: str
    stepped: bool
    curves: list[Curve]
    note: str


@dataclass(frozen=True)
class _Logged:
    """A logged figure: its title, its unit, and the divisor of its values."""

    title: str
    unit: str = ""
    divisor: float = 1


LOGGED = {
    "loss": _Logged("training loss"),
    "learning_rate": _Logged("learning rate"),
    "grad_norm": _Logged("gradient norm"),
    "equilibrium_penalty": _Logged("equilibrium penalty"),
    "tokens_per_second": _Logged("speed", "tokens/s, all ranks"),
    "peak_memory_bytes": _Logged("peak memory since the start", "GiB, first rank", GIB),
}


def panels(runs: Sequence[OpenRun]) -> list[Panel]:
    """All charts that have a value."""
    training = {key: _panel(one.title, one.unit, _logged(runs, key, one.divisor)) for key, one in LOGGED.items()}
    found = [training.pop("loss"), *_held_out(runs), _budget(runs), _parameters(runs), *training.values()]
    return [panel for panel in found if panel.curves]


def _panel(title: str, unit: str, curves: Iterable[Curve], stepped: bool = False) -> Panel:
    """A chart of the curves that have points, thinned to at most :data:`MOST_POINTS` points each."""
    kept = [curve for curve in curves if curve.steps]
    every = math.ceil(max((len(curve.steps) for curve in kept), default=0) / MOST_POINTS)
    note = f"one point of {every} is drawn" if every > 1 else ""
    return Panel(title=title, unit=unit, stepped=stepped, curves=[_thinned(c, every) for c in kept], note=note)


def _thinned(curve: Curve, every: int) -> Curve:
    """Every n-th point, counted from the last, which is always kept."""
    if every <= 1:
        return curve
    return replace(curve, steps=curve.steps[::-every][::-1], values=curve.values[::-every][::-1])


def _curve(name: str, colour: int, points: Iterable[tuple[int, float]], dashed: bool = False) -> Curve:
    """The points in the order of their steps. If two have the same step, the later one counts."""
    by_step = dict(points)
    steps = sorted(by_step)
    values = [by_step[step] if math.isfinite(by_step[step]) else None for step in steps]
    return Curve(name=name, colour=colour, dashed=dashed, steps=steps, values=values)


def _logged(runs: Sequence[OpenRun], key: str, divisor: float) -> list[Curve]:
    return [
        _curve(run.name, number, [(line["step"], line[key] / divisor) for line in run.lines if key in line])
        for number, run in enumerate(runs)
    ]


def _held_out(runs: Sequence[OpenRun]) -> list[Panel]:
    """One chart per figure: for one run with all its sources; for several runs one chart for each source."""
    measured = [[(line["step"], evaluation_of(line)) for line in run.lines if "eval_loss" in line] for run in runs]
    sources = list(dict.fromkeys(name for lines in measured for _, figures in lines for name in source_names(figures)))
    found = []
    for key, metric in HELD_OUT.items():
        unit, factor = ("%", 100) if metric.style.endswith("%") else ("", 1)
        # Colour and name of a curve distinguish the curves of a chart.
        by_source = [
            [
                _curve(
                    (source or "all sources") if len(runs) == 1 and sources else run.name,
                    place if len(runs) == 1 else number,
                    [(step, factor * figures[name]) for step, figures in lines if name in figures],
                )
                for number, (run, lines) in enumerate(zip(runs, measured, strict=True))
            ]
            for place, source in enumerate(["", *sources])
            for name in [f"{source}_{key}" if source else key]
        ]
        if len(runs) == 1:
            found.append(_panel(metric.title, unit, [curve for curves in by_source for curve in curves]))
        else:
            titles = [metric.title, *(f"{metric.title}, {source}" for source in sources)]
            found += [_panel(title, unit, curves) for title, curves in zip(titles, by_source, strict=True)]
    return found


def _budget(runs: Sequence[OpenRun]) -> Panel:
    """Components that are kept, and the number that the configuration sets as target."""
    curves = []
    for number, run in enumerate(runs):
        start, target = run.budget.start, run.budget.target
        points = ([] if start is None else [(0, start)]) + list(run.budget.left.items())
        curves.append(_curve(run.name, number, _held(run, points)))
        if target is not None:
            name = "target" if len(runs) == 1 else f"{run.name}, target"
            curves.append(_curve(name, number, _held(run, [(0, target)]), dashed=True))
    return _panel("components kept", "", curves, stepped=True)


def _parameters(runs: Sequence[OpenRun]) -> Panel:
    curves = []
    for number, run in enumerate(runs):
        points = [(event.step, event.num_parameters / 1e6) for event in run.events if event.num_parameters is not None]
        curves.append(_curve(run.name, number, _held(run, points)))
    return _panel("parameters of the kept components", "millions", curves, stepped=True)


def _held(run: OpenRun, points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, with the last value repeated at the run's last step."""
    last = run.summary["steps"]
    return [*points, (last, points[-1][1])] if points and points[-1][0] < last else list(points)
