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
HELD_OUT = {"loss": Metric("held-out loss", about="How badly the model predicts the answers."), **METRICS}
BEFORE = "before training"
"""Name of the line at what the base's held-out figure was."""


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
        about: what it shows and which direction is good, in a sentence or two.
        unit: unit of the values; empty for a plain number.
        stepped: whether a value holds until the next one, instead of being joined to it by a line.
        curves: the curves, at least one.
        x: first and last step of the axis, where all curves have one and the same; None to follow the curves.
        y: lowest and highest value of the axis, where all values are the same; None to follow the curves.
        note: additional remark; may be empty.
    """

    title: str
    about: str
    unit: str
    stepped: bool
    curves: list[Curve]
    x: tuple[float, float] | None
    y: tuple[float, float] | None
    note: str


@dataclass(frozen=True)
class _Logged:
    """A logged figure.

    Attributes:
        title: title of its chart.
        about: what the figure is and which direction is good.
        unit: its unit.
        divisor: number by which the logged values are divided.
        zero_is_off: whether the chart is left out if all values are 0.
    """

    title: str
    about: str
    unit: str = ""
    divisor: float = 1
    zero_is_off: bool = False


LOGGED = {
    "loss": _Logged("training loss", "How badly the model predicts the rows that it trains on. Lower is better."),
    "learning_rate": _Logged("learning rate", "How far a step moves the adapter; the configuration sets it."),
    "grad_norm": _Logged(
        "gradient norm", "How strongly the loss pulls at the adapter. No direction is good; a sudden jump is a warning."
    ),
    "equilibrium_penalty": _Logged(
        "equilibrium penalty", "How uneven the components' entries are. Training pulls it down.", zero_is_off=True
    ),
    "tokens_per_second": _Logged("speed", "How fast the run trains. Higher is better.", "tokens/s, all processes"),
    "peak_memory_bytes": _Logged(
        "peak memory since the start", "The most memory used so far. Lower is better.", "GiB, first process", GIB
    ),
}


def panels(runs: Sequence[OpenRun]) -> list[Panel]:
    """All charts that have a value."""
    training = {
        key: _panel(runs, one.title, one.about, _logged(runs, key, one), unit=one.unit) for key, one in LOGGED.items()
    }
    found = [training.pop("loss"), *_held_out(runs), _budget(runs), _parameters(runs), *training.values()]
    return [panel for panel in found if panel.curves]


def _panel(
    runs: Sequence[OpenRun], title: str, about: str, curves: Iterable[Curve], unit: str = "", stepped: bool = False
) -> Panel:
    """A chart of the curves that have points, thinned to at most :data:`MOST_POINTS` points each."""
    kept = [curve for curve in curves if curve.steps]
    every = math.ceil(max((len(curve.steps) for curve in kept), default=0) / MOST_POINTS)
    steps = {step for curve in kept for step in curve.steps}
    values = {value for curve in kept for value in curve.values if value is not None}
    last = max(run.fingerprint.num_steps for run in runs)
    return Panel(
        title=title,
        about=about,
        unit=unit,
        stepped=stepped,
        curves=[_thinned(curve, every) for curve in kept],
        x=(-0.03 * last, 1.03 * last) if len(steps) == 1 else None,
        y=_around(values.pop(), unit) if len(values) == 1 else None,
        note=f"one point of {every} is drawn" if every > 1 else "",
    )


def _around(value: float, unit: str) -> tuple[float, float]:
    """A range of an axis on which nothing but this value is drawn."""
    if unit == "%":
        return (-3, 103)  # 0 and 100, and room for a point on the edge
    return (0, 2 * value) if value > 0 else (2 * value, 0) if value < 0 else (-0.03, 1)


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


def _logged(runs: Sequence[OpenRun], key: str, one: _Logged) -> list[Curve]:
    curves = [
        _curve(run.name, number, [(line["step"], line[key] / one.divisor) for line in run.lines if key in line])
        for number, run in enumerate(runs)
    ]
    return curves if not one.zero_is_off or any(any(curve.values) for curve in curves) else []


def _held_out(runs: Sequence[OpenRun]) -> list[Panel]:
    """One chart per figure: for one run with all its sources; for several runs one chart for each source."""
    measured = [[(line["step"], evaluation_of(line)) for line in run.lines if "eval_loss" in line] for run in runs]
    sources = list(dict.fromkeys(name for lines in measured for _, figures in lines for name in source_names(figures)))
    found = []
    for key, metric in HELD_OUT.items():
        unit, factor = ("%", 100) if metric.style.endswith("%") else ("", 1)
        direction = "lower" if key == "loss" else "higher"
        about = f"{metric.about} Measured on examples that the run does not train on; {direction} is better."
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
            curves = [curve for curves in by_source for curve in curves]
            found.append(_panel(runs, metric.title, about, [*curves, *_before(curves)], unit=unit))
        else:
            titles = [metric.title, *(f"{metric.title}, {source}" for source in sources)]
            found += [
                _panel(runs, title, about, curves, unit=unit) for title, curves in zip(titles, by_source, strict=True)
            ]
    return found


def _before(curves: Sequence[Curve]) -> list[Curve]:
    """A line at the first curve's value before the first step, where that was measured and another one after it."""
    first = curves[0]
    if len(first.steps) < 2 or first.steps[0] != 0 or first.values[0] is None:
        return []
    return [_curve(BEFORE, first.colour, [(0, first.values[0]), (first.steps[-1], first.values[0])], dashed=True)]


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
    about = "How many components the adapter has. The budget sets where it ends: no direction is good."
    return _panel(runs, "components kept", about, curves, stepped=True)


def _parameters(runs: Sequence[OpenRun]) -> Panel:
    curves = []
    for number, run in enumerate(runs):
        points = [(event.step, event.num_parameters / 1e6) for event in run.events if event.num_parameters is not None]
        curves.append(_curve(run.name, number, _held(run, points)))
    about = "How large the adapter is without what was removed. The budget sets where it ends."
    return _panel(runs, "parameters of the kept components", about, curves, unit="millions", stepped=True)


def _held(run: OpenRun, points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, with the last value repeated at the run's last step."""
    last = run.summary["steps"]
    return [*points, (last, points[-1][1])] if points and points[-1][0] < last else list(points)
