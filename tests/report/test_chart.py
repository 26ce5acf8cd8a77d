"""Charts: ticks that hold the values, lines inside their frame, whatever the values are."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from detrcli.report import chart, png, svg
from detrcli.report.chart import Chart, Frame, Line, ticks

numbers = st.floats(-1e99, 1e99, allow_nan=False)


@given(st.lists(numbers), st.booleans())
@example([0.0, 5e-324], False)
@example([-1e99, 1e99], True)
def test_ticks_are_even_and_hold_the_values(values, whole):
    found = ticks(values, whole=whole)
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in pairwise(found)]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 1e-6 * max(steps)
    slack = 1e-6 * (found[-1] - found[0])
    assert all(found[0] - slack <= value <= found[-1] + slack for value in values)


def test_ticks_are_round():
    assert ticks([0.03, 0.97]) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks([0, 411], whole=True) == [0, 100, 200, 300, 400, 500]
    assert ticks([3], whole=True)[0] <= 3 <= ticks([3], whole=True)[-1]
    assert [chart.label(v) for v in (0, 0.05, 1e-5, 12000, 2.5e6)] == ["0", "0.05", "1e-05", "12k", "2.5M"]


@given(st.lists(st.tuples(st.floats(0, 1e9), numbers), min_size=1))
def test_points_are_drawn_inside_the_frame(points):
    frame = Frame.of(Chart("t", (Line("a", tuple(points)),)), 10, 20, 100, 50)
    for point in points:
        x, y = frame.place(point)
        assert 10 - 1e-3 <= x <= 110 + 1e-3
        assert 20 - 1e-3 <= y <= 70 + 1e-3
        assert math.isfinite(x + y)


def test_a_line_is_where_its_values_are():
    """Falling, in the colour of its name: bright at the upper left and the lower right, nowhere else."""
    picture = png.draw(
        [Chart("loss", (Line("loss", tuple((float(i), 100.0 - i) for i in range(101))),))], "t"
    )
    blue = [
        (x, y)
        for x in range(picture.width)
        for y in range(picture.height)
        if (p := picture.getpixel((x, y)))[2] > 180 and p[0] < 120
    ]
    left, right = min(blue), max(blue)
    assert left[0] < 70
    assert right[0] > 500
    assert left[1] < 100 < 240 < right[1]
    assert all(
        abs((y - left[1]) / (right[1] - left[1]) - (x - left[0]) / (right[0] - left[0])) < 0.05
        for x, y in blue
    )


def test_nothing_to_draw_is_said():
    assert png.draw([], "empty").size[0] > 400
    assert svg.draw(Chart("t", (Line("<b>", ((1.0, 2.0),)),))).count("&lt;b&gt;") == 1
