"""Charts as one PNG, drawn with Pillow, which is there already: a plotting library would be ten times the size of this project.

Drawn at twice the size and made smaller: that smooths the lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrcli.files import replacing
from detrcli.report.chart import Chart, Frame, label

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, COLUMNS, _FINE = (560, 320), 2, 2
_INK, _GREY, _RULE = "#1c2026", "#5b636e", "#e3e6ea"


def write(path: Path, charts: Sequence[Chart], title: str) -> None:
    picture = draw(charts, title)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def draw(charts: Sequence[Chart], title: str) -> Image:
    """The charts in rows under a title."""
    from PIL import Image, ImageDraw

    rows = max(1, -(-len(charts) // COLUMNS))
    size = (CELL[0] * min(COLUMNS, max(1, len(charts))), CELL[1] * rows + 40)
    canvas = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
    pen = ImageDraw.Draw(canvas)
    _text(pen, (20, 14), title, 16, _INK)
    if not charts:
        _text(pen, (20, 60), "nothing was measured yet", 13, _GREY)
    for i, chart in enumerate(charts):
        _chart(pen, chart, i % COLUMNS * CELL[0], i // COLUMNS * CELL[1] + 40)
    return canvas.resize(size, Image.Resampling.LANCZOS)


def _chart(pen: Any, chart: Chart, left: float, top: float) -> None:
    _text(pen, (left + 20, top + 8), chart.title, 13, _INK)
    frame = Frame.of(chart, left + 60, top + 34, CELL[0] - 84, CELL[1] - 90)
    right, bottom = frame.left + frame.width, frame.top + frame.height
    for value in chart.y_ticks:
        y = frame.place((frame.x[0], value))[1]
        pen.line(_scaled((frame.left, y, right, y)), _RULE, _FINE)
        _text(pen, (frame.left - 8, y), label(value), 11, _GREY, "rm")
    for value in chart.x_ticks:
        x = frame.place((value, frame.y[0]))[0]
        _text(pen, (x, bottom + 12), label(value), 11, _GREY, "mm")
    for one in chart.lines:
        _line(pen, [frame.place(point) for point in one.points], one.hex)
    _legend(pen, chart, left + 60, bottom + 28)


def _line(pen: Any, places: Sequence[tuple[float, float]], colour: str) -> None:
    if len(places) > 1:
        pen.line([_scaled(place) for place in places], colour, 2 * _FINE, joint="curve")
    if len(places) <= 60:
        for x, y in places:
            pen.ellipse(_scaled((x - 2.5, y - 2.5, x + 2.5, y + 2.5)), colour)


def _legend(pen: Any, chart: Chart, left: float, top: float) -> None:
    if len(chart.lines) == 1:
        return
    space = (CELL[0] - 84) / min(len(chart.lines), 4)
    for i, line in enumerate(chart.lines):
        x, y = left + i % 4 * space, top + i // 4 * 16
        pen.rectangle(_scaled((x, y, x + 10, y + 10)), line.hex)
        _text(pen, (x + 15, y + 5), _cut(line.name, space - 22), 11, _GREY, "lm")


def _cut(text: str, width: float) -> str:
    """The text as far as it fits, its middle left out: the names of runs differ at their ends."""
    font = _font(11)
    for kept in range(len(text), 3, -1):
        tried = text if kept == len(text) else f"{text[: kept // 2]}…{text[len(text) - kept + kept // 2 :]}"
        if font.getlength(tried) <= width * _FINE:
            return tried
    return text[:3]


def _text(pen: Any, at: tuple[float, float], text: str, size: int, colour: str, anchor: str = "la") -> None:
    pen.text(_scaled(at), text, colour, _font(size), anchor=anchor)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _FINE)


def _scaled(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value * _FINE for value in values)
