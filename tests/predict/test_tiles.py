"""Large pictures in tiles: small things are found, nothing is found twice, nothing large is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrcli.predict.tiles import OVERLAP, Window, merge, windows
from detrcli.types import Detections
from tests.spotter import RED, scatter, scene, spotter

side = st.integers(1, 4000)


@given(side, side, st.integers(64, 1500))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_the_picture_overlap_and_stay_inside(height, width, tile):
    whole, *tiles = windows(height, width, tile)
    assert whole == Window(0, 0, width, height)
    assert bool(tiles) == (max(height, width) > tile)
    for start, length in (("x", width), ("y", height)):
        starts = sorted({getattr(t, start) for t in tiles}) or [0]
        assert starts[0] == 0
        assert all(0 <= s <= max(0, length - tile) for s in starts)
        if tiles:
            assert starts[-1] + min(tile, length) == length
        steps = [b - a for a, b in pairwise(starts)]
        assert all(step <= tile * (1 - OVERLAP) + 1 for step in steps)


def test_a_large_scene_shows_what_one_pass_misses():
    size = (2400, 1800)
    small = scatter(size, 40, side=24, seed=1)
    large = (1500, 900, 2300, 1700, RED)  # no tile holds it whole
    apart = [s for s in small if s[2] < 1450 or s[3] < 850]
    picture = scene(size, (*apart, large))
    [once] = spotter().predict(picture)
    [tiled] = spotter().predict(picture, tile=500)
    assert len(apart) > 20
    assert [d.box for d in once.detections] == [pytest.approx(large[:4], abs=10)]
    assert len(tiled) == len(apart) + 1
    for x1, y1, x2, y2, colour in (*apart, large):
        name = "red spot" if colour == RED else "blue spot"
        assert any(
            d.box == pytest.approx((x1, y1, x2, y2), abs=10) for d in tiled.detections if d.name == name
        )


def answer(*rows: tuple[float, int, tuple[float, ...]]) -> Detections:
    return Detections(
        torch.tensor([r[0] for r in rows]),
        torch.tensor([r[1] for r in rows], dtype=torch.int64),
        torch.tensor([r[2] for r in rows]).reshape(-1, 4),
    )


LEFT, RIGHT = Window(0, 0, 100, 100), Window(60, 0, 100, 100)


def test_one_view_is_left_as_it_is():
    """A model's own repeats are its business: it was trained to give each object one query."""
    twice = answer((0.9, 0, (10, 10, 20, 20)), (0.8, 0, (10, 10, 20, 21)))
    assert merge([twice], [LEFT], 100, 160) is twice
    both = merge([twice, answer()], [LEFT, RIGHT], 100, 160)
    assert len(both) == 2


def test_a_whole_box_beats_the_part_that_a_tile_cut_off_it():
    cut = answer((0.95, 0, (80, 10, 99, 50)))
    whole = answer((0.6, 0, (20, 10, 80, 50)))
    merged = merge([cut, whole], [LEFT, RIGHT], 100, 160)
    assert merged.boxes.tolist() == [[80, 10, 140, 50]]
    assert merged.scores.tolist() == pytest.approx([0.6])


def test_the_surer_of_two_whole_boxes_stays_and_other_classes_are_no_rivals():
    first = answer((0.6, 0, (70, 10, 90, 30)))
    second = answer((0.9, 0, (10, 10, 30, 30)), (0.5, 1, (10, 10, 30, 30)))
    merged = merge([first, second], [LEFT, RIGHT], 100, 160)
    assert list(zip(merged.labels.tolist(), merged.boxes.tolist(), strict=True)) == [
        (0, [70, 10, 90, 30]),
        (1, [70, 10, 90, 30]),
    ]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.5])


def test_a_small_object_before_a_large_one_is_kept():
    """Held by a larger box of its class, but whole: a child before a bus of children."""
    large = answer((0.9, 0, (0, 0, 60, 60)))
    small = answer((0.8, 0, (10, 20, 20, 30)))
    whole = Window(0, 0, 160, 100)
    assert len(merge([large, small], [whole, Window(0, 0, 100, 100)], 100, 160)) == 2


def test_tiles_and_batches_go_together():
    pictures = [scene((700, 500), scatter((700, 500), 6, 24, seed)) for seed in range(3)] + [
        scene((90, 90), ())
    ]
    one = [r.to_dict()["detections"] for r in spotter().predict(pictures, tile=300)]
    four = [r.to_dict()["detections"] for r in spotter().predict(pictures, tile=300, batch=4)]
    assert [len(found) for found in one] == [6, 6, 6, 0]
    assert one == four
