"""The trade-off of a zoo: published AP over counted GFLOPs, a marker for each family; as a picture or as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple, Protocol

from detrcli.errors import UsageError
from detrcli.files import replacing
from detrcli.plugins import Model
from detrcli.profile.run import Profile

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 70, 220, 40, 60
INK, FAINT = "#24292f", "#d0d7de"
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#0e8a8a", "#953800", "#57606a")
SIDES = (0, 4, 3, -4, 5, 6, -3, 8)  # of each family's marker: 0 a circle, negative standing on its point
SIZE = 6
LETTER = 6.2  # width of a letter of the labels, about

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """A model: what it costs and what its paper says it reaches."""

    name: str  # of the variant
    series: str  # its family and paper
    gflops: float
    ap: float


class Canvas(Protocol):
    def line(self, a: Point, b: Point, colour: str) -> None: ...
    def polygon(self, corners: Sequence[Point], colour: str) -> None: ...
    def circle(self, centre: Point, radius: float, colour: str) -> None: ...
    def text(self, at: Point, text: str, colour: str, anchor: str = "start") -> None: ...
    def save(self, path: Path) -> None: ...


def points(profiles: Sequence[Profile]) -> list[Mark]:
    """The models whose papers give an AP."""
    found = [(p, p.model.variant.published) for p in profiles]
    return [
        Mark(p.model.variant.name, series(p.model), p.macs / 1e9, published.ap)
        for p, published in found
        if published and published.ap
    ]


def series(model: Model) -> str:
    return f"{model.family.name}, {model.paper.venue} {model.paper.year}"


def draw(marks: Sequence[Mark], path: Path) -> None:
    kinds: dict[str, Callable[[], Canvas]] = {".svg": Svg, ".png": Png}
    if path.suffix.lower() not in kinds:
        raise UsageError(f"a plot is a .svg or a .png file, not {path.name!r}", hint="--plot tradeoff.svg")
    if not marks:
        raise UsageError(
            "no published AP among these models: nothing to draw", hint="leave --model away for all"
        )
    canvas = kinds[path.suffix.lower()]()
    _draw(canvas, marks)
    with replacing(path) as temporary:
        canvas.save(temporary)


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to pixels, with round ticks."""

    ticks: tuple[float, ...]
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Scale:
        low, high = min(values), max(values)
        step = _round_step((high - low) / 5 or 1.0)
        first = math.floor(low / step - 0.2)
        last = math.ceil(high / step + 0.2)
        return cls(tuple(step * i for i in range(first, last + 1)), start, end)

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(k for k in (1, 2, 5, 10) if k * power >= rough)


def _draw(canvas: Canvas, marks: Sequence[Mark]) -> None:
    x = Scale.over([m.gflops for m in marks], LEFT, WIDTH - RIGHT)
    y = Scale.over([m.ap for m in marks], HEIGHT - BOTTOM, TOP)
    _axes(canvas, x, y)
    kinds = list(dict.fromkeys(m.series for m in marks))
    at = {mark: (x(mark.gflops), y(mark.ap)) for mark in marks}
    taken = [Box.around(point) for point in at.values()]
    for mark, point in sorted(at.items(), key=lambda item: item[1]):
        _marker(canvas, point, kinds.index(mark.series) % len(COLOURS))
        box = Box.label(point, mark.name, taken)
        taken.append(box)
        canvas.text((box.left, box.bottom - 3), mark.name, INK)
    for row, name in enumerate(kinds):
        point = (WIDTH - RIGHT + 24.0, TOP + 12.0 + 22 * row)
        _marker(canvas, point, row % len(COLOURS))
        canvas.text((point[0] + 12, point[1] + 4), name, INK)


class Box(NamedTuple):
    """Where something stands, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, point: Point) -> Box:
        return cls(point[0] - SIZE, point[1] - SIZE, point[0] + SIZE, point[1] + SIZE)

    @classmethod
    def label(cls, point: Point, text: str, taken: Sequence[Box]) -> Box:
        """Beside the point where nothing else stands: right, left, above, below, then further and further below."""
        x, y, width = *point, len(text) * LETTER
        places = [(x + 9, y - 7), (x - 9 - width, y - 7), (x - width / 2, y - 21), (x - width / 2, y + 7)]
        places += [(x + 9, y + 7 * step) for step in range(1, 20)]
        boxes = [cls(left, top, left + width, top + 14) for left, top in places]
        return next((box for box in boxes if not any(box.meets(other) for other in taken)), boxes[0])

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _axes(canvas: Canvas, x: Scale, y: Scale) -> None:
    for tick in x.ticks:
        canvas.line((x(tick), TOP), (x(tick), HEIGHT - BOTTOM), FAINT)
        canvas.text((x(tick), HEIGHT - BOTTOM + 18), f"{tick:g}", INK, "middle")
    for tick in y.ticks:
        canvas.line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), FAINT)
        canvas.text((LEFT - 8, y(tick) + 4), f"{tick:g}", INK, "end")
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18), "GFLOPs, counted (multiply-adds)", INK, "middle")
    canvas.text((LEFT - 50, TOP - 16), "AP on COCO val2017, published", INK)


def _marker(canvas: Canvas, at: Point, kind: int) -> None:
    sides, colour = SIDES[kind], COLOURS[kind]
    if sides == 0:
        canvas.circle(at, SIZE - 1, colour)
        return
    turn = math.pi / 2 if sides < 0 else math.pi / 2 + math.pi / sides
    corners = [
        (
            at[0] + SIZE * math.cos(turn + 2 * math.pi * i / abs(sides)),
            at[1] - SIZE * math.sin(turn + 2 * math.pi * i / abs(sides)),
        )
        for i in range(abs(sides))
    ]
    canvas.polygon(corners, colour)


class Svg:
    def __init__(self) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        ]

    def line(self, a: Point, b: Point, colour: str) -> None:
        self.parts.append(f'<path d="M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" stroke="{colour}"/>')

    def polygon(self, corners: Sequence[Point], colour: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self.parts.append(f'<polygon points="{path}" fill="{colour}"/>')

    def circle(self, centre: Point, radius: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{centre[0]:.1f}" cy="{centre[1]:.1f}" r="{radius}" fill="{colour}"/>')

    def text(self, at: Point, text: str, colour: str, anchor: str = "start") -> None:
        where = f'x="{at[0]:.1f}" y="{at[1]:.1f}"'
        self.parts.append(f'<text {where} fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>')

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>\n"]), encoding="utf-8")


class Png:
    FACTOR = 2  # drawn larger, so that it is sharp on fine screens

    def __init__(self) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.image = Image.new("RGB", (WIDTH * self.FACTOR, HEIGHT * self.FACTOR), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(12 * self.FACTOR)

    def _at(self, point: Point) -> Point:
        return point[0] * self.FACTOR, point[1] * self.FACTOR

    def line(self, a: Point, b: Point, colour: str) -> None:
        self.pen.line([self._at(a), self._at(b)], fill=colour, width=self.FACTOR)

    def polygon(self, corners: Sequence[Point], colour: str) -> None:
        self.pen.polygon([self._at(corner) for corner in corners], fill=colour)

    def circle(self, centre: Point, radius: float, colour: str) -> None:
        x, y = self._at(centre)
        r = radius * self.FACTOR
        self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def text(self, at: Point, text: str, colour: str, anchor: str = "start") -> None:
        side = {"start": "l", "middle": "m", "end": "r"}[anchor]
        self.pen.text(self._at(at), text, fill=colour, font=self.font, anchor=f"{side}s")

    def save(self, path: Path) -> None:
        self.image.save(path, "PNG")


def as_text(marks: Sequence[Mark], columns: int = 72, rows: int = 20) -> str:
    """The same in letters, one a family; `*` where several meet."""
    if not marks:
        return ""
    x = Scale.over([m.gflops for m in marks], 0, columns - 1)
    y = Scale.over([m.ap for m in marks], rows - 1, 0)
    kinds = list(dict.fromkeys(m.series for m in marks))
    grid = [[" "] * columns for _ in range(rows)]
    for mark in marks:
        column, row, letter = (
            round(x(mark.gflops)),
            round(y(mark.ap)),
            chr(ord("A") + kinds.index(mark.series)),
        )
        grid[row][column] = letter if grid[row][column] in (" ", letter) else "*"
    labels = {round(y(tick)): f"{tick:g}" for tick in y.ticks}
    lines = [f"{labels.get(i, ''):>5} |{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    axis = [" "] * (columns + 6)
    for tick in x.ticks:
        text = f"{tick:g}"
        start = min(round(x(tick)), columns + 6 - len(text))
        axis[start : start + len(text)] = text
    legend = ", ".join(f"{chr(ord('A') + i)} {name}" for i, name in enumerate(kinds))
    return "\n".join(
        [
            "AP published",
            *lines,
            f"      +{'-' * columns}",
            "       " + "".join(axis).rstrip() + "  GFLOPs counted",
            legend,
        ]
    )
