"""A chart as SVG inside a page; colours follow the page's."""

from __future__ import annotations

from html import escape

from detrcli.report.chart import Chart, Frame, Line, label

WIDTH, HEIGHT = 460, 250
_MARKED = 60  # with so few points each is marked, and says its value


def draw(chart: Chart) -> str:
    frame = Frame.of(chart, 46, 12, WIDTH - 58, HEIGHT - 62)
    parts = [*_grid(chart, frame), *(_line(one, frame) for one in chart.lines), *_legend(chart)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _grid(chart: Chart, frame: Frame) -> list[str]:
    parts = []
    bottom, right = frame.top + frame.height, frame.left + frame.width
    for value in chart.y_ticks:
        _, y = frame.place((frame.x[0], value))
        parts.append(f'<line class="grid" x1="{frame.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{frame.left - 6}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in chart.x_ticks:
        x, _ = frame.place((value, frame.y[0]))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{label(value)}</text>')
    return parts


def _line(line: Line, frame: Frame) -> str:
    places = [frame.place(point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{path}" stroke="{line.hex}"/>'
    if len(places) > _MARKED:
        return drawn
    marks = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{line.hex}">'
        f"<title>{escape(line.name)} {value:.5g} at step {step:g}</title></circle>"
        for (x, y), (step, value) in zip(places, line.points, strict=True)
    )
    return drawn + "".join(marks)


def _legend(chart: Chart) -> list[str]:
    if len(chart.lines) == 1:
        return []
    space = (WIDTH - 46) / min(len(chart.lines), 4)
    parts = []
    for i, line in enumerate(chart.lines):
        x, y = 46 + i % 4 * space, HEIGHT - 20 + i // 4 * 14
        parts.append(f'<rect x="{x:.1f}" y="{y - 8}" width="10" height="10" rx="2" fill="{line.hex}"/>')
        parts.append(f'<text x="{x + 14:.1f}" y="{y + 1}">{escape(_short(line.name, space))}</text>')
    return parts


def _short(name: str, space: float) -> str:
    fits = max(4, int((space - 18) / 6))
    return name if len(name) <= fits else f"{name[: fits // 2]}…{name[len(name) - fits + fits // 2 + 1 :]}"
