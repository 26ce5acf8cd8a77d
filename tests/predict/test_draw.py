"""Annotated pictures: boxes where the objects are, labels that can be read."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrcli.predict.draw import SMALL, _inside, _overlap, _place, annotate, colour_of, ink_on, label_of
from detrcli.predict.result import Detection

number = st.floats(-50, 450)


def grey(height, width):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def test_a_box_is_drawn_in_the_colour_of_its_class():
    found = Detection(7, "cat", 0.9, (100, 120, 300, 320))
    pixels = np.asarray(annotate(grey(480, 640), [found]))
    assert (pixels[200, 100] == colour_of(7)).all()
    assert (pixels[320, 200] == colour_of(7)).all()
    assert (pixels[200, 200] == 128).all()


def test_the_best_detection_is_drawn_on_top():
    best, other = (Detection(i, "x", s, (100, 100, 300, 300)) for i, s in ((1, 0.9), (2, 0.5)))
    pixels = np.asarray(annotate(grey(480, 640), [best, other]))
    assert (pixels[200, 100] == colour_of(1)).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 3000), (30, 40), (479, 100), (2000, 3000)])
def test_pictures_of_any_size_are_drawn_and_small_ones_enlarged(height, width):
    found = Detection(1, "person", 0.5, (0, 0, float(width), float(height)))
    drawn = annotate(grey(height, width), [found])
    assert max(drawn.size) >= SMALL
    assert drawn.width % width == 0
    assert drawn.width / width == drawn.height / height


def test_colours_are_stable_and_neighbours_differ():
    assert colour_of(1) == colour_of(1)
    colours = [colour_of(i) for i in range(91)]
    assert len(set(colours)) == 91
    for a, b in pairwise(colours):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 100
    assert all(abs(sum(ink_on(c)) / 3 - (0.3 * c[0] + 0.6 * c[1] + 0.1 * c[2])) > 90 for c in colours)


def test_labels_do_not_cover_each_other_while_there_is_room():
    boxes = [(200.0 + 15 * i, 150.0 + 6 * i, 320.0 + 15 * i, 400.0 + 3 * i) for i in range(8)]
    taken = []
    for box in boxes:
        taken.append(_place(box, (80, 20), (640, 480), taken))
    assert all(_overlap(a, b) < 1e-6 for i, a in enumerate(taken) for b in taken[:i])


@given(number, number, st.floats(1, 200), st.floats(1, 60))
@settings(max_examples=100, deadline=None)
def test_labels_stay_inside_the_picture(x, y, width, height):
    x1, y1, x2, y2 = _inside((x, y, x + width, y + height), (400, 300))
    assert (x1, y1) >= (0, 0)
    assert x2 <= 400 + 1e-9
    assert y2 <= 300 + 1e-9
    assert (x2 - x1, y2 - y1) == pytest.approx((width, height))


def test_names_are_drawn_in_letters_that_there_are_or_by_id():
    assert label_of(Detection(3, "Fußgänger", 0.987, (0, 0, 1, 1))) == "Fußgänger 0.99"
    assert label_of(Detection(3, "two\nlines", 0.5, (0, 0, 1, 1))) == "two lines 0.50"
    assert label_of(Detection(3, "\U0010fffd\U0010fffe", 0.5, (0, 0, 1, 1))) == "class 3 0.50"
    assert len(label_of(Detection(3, "long " * 50, 0.5, (0, 0, 1, 1)))) < 40


@given(
    st.lists(st.tuples(st.integers(0, 90), st.text(max_size=8), number, number, number, number), max_size=6)
)
@settings(max_examples=25, deadline=None)
def test_any_boxes_and_names_are_drawn(rows):
    found = [Detection(i, name, 0.5, (x1, y1, x2, y2)) for i, name, x1, y1, x2, y2 in rows]
    assert annotate(grey(300, 400), found).size == (800, 600)
