"""Outlines of every kind, and how they travel with their objects."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from detrcli.data.catalog import resolve
from detrcli.data.loader import train_loader
from detrcli.data.masks import draw
from detrcli.data.transforms import training
from detrcli.plugins.contract import Preprocess

from .miniature import coco_document

SIZE = (48, 64)
BOX = np.array([8.0, 4.0, 20.0, 10.0])
SQUARE = [8, 4, 28, 4, 28, 14, 8, 14]


def drawn_square() -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[4:14, 8:28] = 1
    return mask


def coded(mask: np.ndarray) -> dict:
    found = rle.frPyObjects(runs(mask), *SIZE)
    return {"size": list(SIZE), "counts": found["counts"].decode()}


def runs(mask: np.ndarray) -> dict:
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": list(SIZE), "counts": np.diff([0, *ends, flat.size]).tolist()}


@pytest.mark.parametrize(
    "outline",
    [
        [SQUARE],
        coded(drawn_square()),
        runs(drawn_square()),
        None,
        [],
    ],
)
def test_polygons_run_lengths_and_nothing_give_the_same_square(outline):
    assert np.array_equal(draw(outline, BOX, SIZE), drawn_square())


def test_polygons_of_one_object_are_joined():
    other = [40, 20, 50, 20, 50, 30, 40, 30]
    assert draw([SQUARE, other], BOX, SIZE).sum() == drawn_square().sum() + 100


@given(st.integers(0, 2**32))
def test_compressed_run_lengths_are_read_as_they_were_written(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random(SIZE) < rng.random()).astype(np.uint8)
    assert np.array_equal(draw(coded(mask), BOX, SIZE), mask)
    assert np.array_equal(draw(runs(mask), BOX, SIZE), mask)


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_travel_with_their_objects(coco_folder, workers):
    document = coco_document()
    for row in document["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for split in ("train2017", "val2017"):
        (coco_folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    dataset = resolve(str(coco_folder), "train", masks=True)
    tiny = Preprocess(short_side=64, long_side=96)
    batches = train_loader(dataset, training("detr", tiny), batch_size=4, seed=0, workers=workers)
    checked = 0
    for epoch in range(4):
        (batch,) = batches.epoch(epoch)
        for target, padding in zip(batch.targets, batch.mask, strict=True):
            masks = target.extras["masks"]
            assert masks.shape == (len(target.labels), *padding.shape)
            assert masks.dtype == torch.bool
            assert not (masks & padding).any()
            height, width = (~padding).sum(0).max(), (~padding).sum(1).max()
            for mask, (_, _, w, h) in zip(masks, target.boxes, strict=True):
                assert abs(int(mask.sum()) - float(w * width * h * height)) <= 2 * (height + width)
                checked += 1
    assert checked > 8


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(st.sampled_from(["counts", "size", "x"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING | st.lists(st.lists(st.floats() | st.integers(), max_size=9), max_size=3))
def test_any_outline_gives_a_mask_of_the_pictures_size_or_none(outline):
    mask = draw(outline, BOX, SIZE)
    assert mask is None or mask.shape == SIZE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, 4000), max_size=6), st.text(st.characters(max_codepoint=127), max_size=12))
def test_run_lengths_that_do_not_fill_the_picture_are_not_followed(counts, text):
    for value in (counts, text):
        mask = draw({"size": list(SIZE), "counts": value}, BOX, SIZE)
        assert mask is None or mask.shape == SIZE
