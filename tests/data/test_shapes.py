from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from detrcli.data.shapes import PRESETS, SPLITS, load_shapes
from detrcli.errors import UsageError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_picture_depends_on_seed_split_and_index_alone(preset):
    few, many = load_shapes(preset, "val", count=3), load_shapes(preset, "val", count=9)
    assert torch.equal(few.picture(2), many.picture(2))
    assert few.annotations.boxes.tolist() == many.annotations.boxes[: len(few.annotations.ids)].tolist()
    assert not torch.equal(few.picture(2), load_shapes(preset, "val", count=3, seed=1).picture(2))
    pictures = [
        load_shapes(preset, split, count=3).picture(i).numpy().tobytes() for split in SPLITS for i in range(3)
    ]
    assert len(set(pictures)) == 9  # the splits share nothing


@pytest.mark.parametrize("preset", PRESETS)
def test_objects_are_where_their_boxes_say(preset):
    dataset = load_shapes(preset, count=60)
    rules = PRESETS[preset]
    for index in range(len(dataset)):
        objects, image = dataset.annotations.objects(index), dataset.picture(index).float()
        assert 1 <= len(objects.labels) <= rules.objects
        for x, y, w, h in objects.boxes.astype(int).tolist():
            assert x >= 0
            assert y >= 0
            assert max(x + w, y + h) <= rules.size
            low, high = (round(s * rules.size) for s in rules.sides)
            assert low <= w == h <= high
            inner = image[:, y + h // 2 - 1 : y + h // 2 + 1, x + w // 2 - 1 : x + w // 2 + 1]
            assert inner.shape == (3, 2, 2)


def test_boxes_overlap_little_and_areas_are_those_of_the_shapes():
    dataset = load_shapes("hard", count=200)
    share = {name: [] for name in dataset.categories.names}
    for index in range(len(dataset)):
        objects = dataset.annotations.objects(index)
        for row, (label, box) in enumerate(zip(objects.labels, objects.boxes, strict=True)):
            share[dataset.categories.names[label]].append(
                dataset.annotations.areas[objects.rows][row] / box[2] ** 2
            )
            for other in objects.boxes[:row]:
                width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
                height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
                assert max(width, 0) * max(height, 0) <= 0.1 * min(box[2], other[2]) ** 2
    expected = {"circle": np.pi / 4, "square": 1, "triangle": 0.5}
    for name, shares in share.items():
        assert np.mean(shares) == pytest.approx(expected[name], abs=0.03)


def test_in_the_easy_preset_the_hue_tells_the_class():
    dataset = load_shapes(count=100)
    right = 0
    for index in range(100):
        objects, image = dataset.annotations.objects(index), dataset.picture(index).float()
        label, (x, y, w, h) = objects.labels[-1], objects.boxes[-1].astype(int)  # the last one is on top
        centre = image[:, y + h // 2 : y + h // 2 + 3, x + w // 2 - 1 : x + w // 2 + 2].mean(dim=(1, 2))
        right += int(centre.argmax()) == label  # red circles, green squares, blue triangles
    assert right >= 97


def test_a_picture_costs_about_a_millisecond():
    dataset = load_shapes(count=100)
    dataset.picture(0)
    started = time.process_time()
    for index in range(100):
        dataset.picture(index)
    assert (time.process_time() - started) / 100 < 0.004  # four times slack for a busy machine


def test_wrong_names_and_counts_are_refused():
    with pytest.raises(UsageError, match="unknown preset of shapes: 'hrad'") as caught:
        load_shapes("hrad")
    assert "hard" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="unknown split"):
        load_shapes(split="training")
    with pytest.raises(UsageError, match="at least one"):
        load_shapes(count=0)
