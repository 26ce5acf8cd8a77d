"""A chart as numbers: lines, the range they take, and where the ticks are. `svg` and `png` draw the same one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detrcli.runs import History, Run, shown

Point = tuple[float, float]
COLOURS = ("#2f6fde", "#e0652b", "#1f9d6b", "#a04fd0", "#c43d5b", "#7a7f1d", "#1899ad", "#8a6046")
LARGEST = 1e100  # of a value: beyond it the range of an axis is no number


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: tuple[Point, ...]
    colour: int = 0  # place in COLOURS, turning

    @property
    def hex(self) -> str:
        return COLOURS[self.colour % len(COLOURS)]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over steps."""

    title: str
    lines: tuple[Line, ...]

    @property
    def x_ticks(self) -> list[float]:
        return ticks([x for line in self.lines for x, _ in line.points], whole=True)

    @property
    def y_ticks(self) -> list[float]:
        return ticks([y for line in self.lines for _, y in line.points])


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart's values go on paper."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def of(cls, chart: Chart, left: float, top: float, width: float, height: float) -> Frame:
        xs, ys = chart.x_ticks, chart.y_ticks
        return cls(left, top, width, height, (xs[0], xs[-1]), (ys[0], ys[-1]))

    def place(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height


def ticks(values: Sequence[float], count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers, evenly spaced, around the values: two at least."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if size < 1e-200:
        low, high = 0.0, 1.0
    elif high - low <= 1e-12 * size:
        low, high = low - 0.5 * size, high + 0.5 * size
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [
        round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, max(last, first + 1) + 1)
    ]


def label(value: float) -> str:
    """A tick's number: 12k, 0.05, 2e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:g}"


def line(history: History, name: str, as_name: str | None = None, colour: int = 0) -> Line | None:
    """A curve of a run, if it has that one."""
    xs, ys = history.curve(name)
    points = tuple((x, y) for x, y in zip(xs, ys, strict=True) if max(abs(x), abs(y)) < LARGEST)
    return Line(as_name or shown(name, 40), points, colour) if points else None


def of_run(history: History) -> list[Chart]:
    """What one run is judged by; a chart that has nothing to show is left out."""
    terms = [name for name in history.terms if not name.rsplit("_", 1)[-1].isdigit()][: len(COLOURS)]
    wanted = {
        "loss": ["loss"],
        "AP on the validation split": ["ap", "ap50", "ap75"],
        "terms of the loss (last layer)": terms,
        "learning rate": ["lr"],
        "seconds a step": ["seconds", "waited"],
        "norm of the gradient": ["grad_norm"],
    }
    return [chart for title, names in wanted.items() if (chart := _chart(history, title, names))]


_NAMES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "seconds": "whole", "waited": "waiting for data"}


def _chart(history: History, title: str, names: Sequence[str]) -> Chart | None:
    drawn = [line(history, name, _NAMES.get(name), i) for i, name in enumerate(names)]
    lines = tuple(one for one in drawn if one)
    return Chart(title, lines) if lines else None


def of_runs(runs: Sequence[Run], histories: Sequence[History]) -> list[Chart]:
    """Several runs on one sheet: a line each."""
    charts = []
    wanted = {
        "loss": "loss",
        "AP on the validation split": "ap",
        "learning rate": "lr",
        "seconds a step": "seconds",
    }
    for title, name in wanted.items():
        drawn = [
            line(h, name, shown(run.name, 40), i)
            for i, (run, h) in enumerate(zip(runs, histories, strict=True))
        ]
        lines = tuple(one for one in drawn if one)
        charts += [Chart(title, lines)] if lines else []
    return charts
