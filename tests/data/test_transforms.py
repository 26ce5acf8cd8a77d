from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detrcli.data.annotations import Objects
from detrcli.data.transforms import (
    Crop,
    Flip,
    View,
    evaluation,
    normalise,
    prepare,
    resized,
    scale_pixels,
    target_of,
    training,
    view_of,
)
from detrcli.errors import UsageError
from detrcli.plugins.contract import Preprocess

from .miniature import picture

COCO = Preprocess()
TINY = Preprocess(short_side=64, long_side=96)


def pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(width, height, seed))).permute(2, 0, 1)


def objects(boxes, labels=None, crowd=None) -> Objects:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    labels = np.arange(len(boxes)) if labels is None else np.array(labels)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd, bool)
    return Objects(labels, boxes, crowd, slice(0, len(boxes)))


@pytest.mark.parametrize(("height", "width", "expected"), [
    (480, 640, (800, 1066)),  # int(800 * 640 / 480), not rounded to 1067
    (640, 480, (1066, 800)),
    (500, 500, (800, 800)),
    (300, 1000, (400, 1333)),  # capped: round(1333 * 300 / 1000), then int(400 * 1000 / 300)
    (375, 1242, (402, 1331)),  # the cap can be missed by the truncation
    (800, 1200, (800, 1200)),
    (1, 5000, (1, 5000)),  # round(0.27) would leave no picture
])  # fmt: skip
def test_the_resize_rule_is_detrs(height, width, expected):
    assert resized((height, width), 800, 1333) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 900), st.integers(1, 1400))
def test_a_resized_picture_keeps_a_side_of_one_pixel_and_its_orientation(height, width, short, long):
    new = resized((height, width), short, long)
    assert min(new) >= 1
    assert (new[0] - new[1]) * (height - width) >= 0
    assert resized((width, height), short, long) == new[::-1]


def test_scaling_is_pillows_bilinear_within_one_level():
    source = picture(160, 120)
    for size in ((200, 266), (60, 80), (33, 121)):
        ours = scale_pixels(pixels(120, 160), size).permute(1, 2, 0).int().numpy()
        theirs = np.asarray(source.resize(size[::-1], Image.Resampling.BILINEAR), np.int32)
        assert np.abs(ours - theirs).max() <= 1


def test_normalising_is_the_textbook_formula():
    image = pixels(9, 7)
    mean, std = (torch.tensor(v)[:, None, None] for v in (COCO.mean, COCO.std))
    torch.testing.assert_close(normalise(image, COCO), (image / 255 - mean) / std)


def test_evaluation_and_prediction_see_the_same_picture():
    image = pixels(48, 64)
    view = evaluation(TINY)(view_of(image, objects([])), np.random.default_rng(0))
    assert torch.equal(normalise(view.pixels, TINY), prepare(image, TINY))


def test_objects_that_teach_nothing_are_dropped_and_the_rest_is_clipped():
    boxes = [[-5, 2, 15, 10], [3, 3, 0, 5], [3, 3, 5, -1], [1, 1, 4, 4], [90, 1, 5, 5]]
    view = view_of(pixels(20, 30), objects(boxes, crowd=[0, 0, 0, 1, 0]))
    assert view.labels.tolist() == [0]
    assert view.boxes.tolist() == [[0, 2, 10, 12]]


def test_a_picture_without_objects_stays_a_sample():
    target = target_of(training("detr", TINY)(view_of(pixels(20, 30), objects([])), np.random.default_rng(0)))
    assert target.boxes.shape == (0, 4)
    assert (target.labels.shape, target.labels.dtype) == ((0,), torch.int64)


def marked(height: int, width: int, box: tuple[int, int, int, int]) -> View:
    """A black picture with a white box, and the box as its object."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x, y, w, h = box
    image[:, y : y + h, x : x + w] = 255
    return view_of(image, objects([box]))


@given(st.integers(0, 2**32), st.sampled_from(["detr", "flip", "none"]))
def test_boxes_follow_their_pixels(seed, kind):
    view = training(kind, TINY)(marked(60, 90, (20, 12, 30, 24)), np.random.default_rng(seed))
    white = (view.pixels[0] > 127).nonzero()
    if len(view.boxes) == 0:
        assert len(white) == 0
        return
    top, left = white.amin(0).tolist()
    bottom, right = (white.amax(0) + 1).tolist()
    assert np.abs(view.boxes[0] - (left, top, right, bottom)).max() <= 1
    box = target_of(view).boxes[0]
    assert (box >= 0).all()
    assert (box <= 1).all()


def test_masks_follow_their_pixels():
    for seed in range(20):
        view = marked(60, 90, (20, 12, 30, 24))
        view.masks = (view.pixels[:1] > 127).to(torch.uint8)
        training("detr", TINY)(view, np.random.default_rng(seed))
        if len(view.boxes):
            mask, white = view.masks[0].bool(), view.pixels[0] > 127
            assert (mask != white).sum() <= 2 * sum(view.size)  # not more than a rim
            assert target_of(view).extras["masks"].shape[1:] == view.size


def test_flipping_twice_is_nothing():
    always = SimpleNamespace(random=lambda: 0.0)
    view = marked(20, 30, (3, 4, 5, 6))
    image, boxes = view.pixels.clone(), view.boxes.copy()
    Flip()(view, always)
    assert view.boxes.tolist() == [[22, 4, 27, 10]]
    Flip()(view, always)
    assert torch.equal(view.pixels, image)
    assert np.array_equal(view.boxes, boxes)


def test_a_crop_is_never_larger_than_the_picture_and_drops_what_left_it():
    for seed in range(50):
        view = marked(30, 200, (0, 0, 10, 10))
        Crop(38, 60)(view, np.random.default_rng(seed))
        assert view.size[0] == 30
        assert 38 <= view.size[1] <= 60
        assert len(view.boxes) == int((view.pixels > 0).any())


def test_detrs_recipe_draws_all_its_scales_and_half_its_crops():
    transform, sizes, cropped = training("detr", COCO), set(), 0
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    for seed in range(80):
        view = transform(View(image, np.zeros((0, 4)), np.zeros(0, np.int64)), np.random.default_rng(seed))
        sizes.add(min(view.size))
        cropped += view.size[1] / view.size[0] not in {
            resized((60, 80), s, 1333)[1] / s for s in range(480, 801, 32)
        }
        assert max(view.size) <= 1333
    assert sizes == set(range(480, 801, 32))
    assert 25 <= cropped <= 55


def test_a_sample_depends_on_its_generator_alone():
    def draw(seed):
        view = training("detr", TINY)(marked(60, 90, (20, 12, 30, 24)), np.random.default_rng(seed))
        return view.pixels, view.boxes

    (a, x), (b, y), (c, _) = draw(3), draw(3), draw(4)
    assert torch.equal(a, b)
    assert np.array_equal(x, y)
    assert not torch.equal(a, c)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UsageError, match="unknown augmentation 'detrr'"):
        training("detrr", COCO)
