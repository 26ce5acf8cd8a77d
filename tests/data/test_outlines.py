"""Instance masks: from polygons, RLE and the shapes' own outlines, through the loader, and only when a model asks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.catalog import find, resolve
from detrcli.data.check import check
from detrcli.data.formats.coco import read_coco
from detrcli.data.masks import draw, masks_of, without_outline
from detrcli.data.shapes import CATEGORIES, Shapes, _coverage, load_shapes
from detrcli.data.write import write_coco
from detrcli.errors import DataError

from .miniature import coco_document

SIZE = (12, 20)
BOX = (4.0, 2.0, 8.0, 6.0)
POLYGON = [[4, 2, 12, 2, 12, 8, 4, 8]]
FILLED = np.zeros(SIZE, np.uint8)
FILLED[2:8, 4:12] = 1


def compressed() -> dict[str, object]:
    coded = rle.encode(np.asfortranarray(FILLED))
    return {"size": coded["size"], "counts": coded["counts"].decode()}


def uncompressed() -> dict[str, object]:
    changes = np.flatnonzero(np.diff(FILLED.T.flatten(), prepend=9, append=9))  # column by column
    return {"size": list(SIZE), "counts": np.diff(changes).tolist()}


@pytest.mark.parametrize("outline", [POLYGON, compressed(), uncompressed(), None, []])
def test_every_form_of_outline_is_drawn(outline):
    assert np.array_equal(draw(outline, BOX, SIZE), FILLED)


def objects_with(segment: object) -> Dataset:
    builder = Builder(segments_wanted=True)
    builder.image(1, "a.png", *SIZE)
    builder.add(0, 7, 0, BOX, segment=json.dumps(segment))
    return Dataset("x", "train", CATEGORIES, builder.build(), load_shapes(count=1).pictures)


@pytest.mark.parametrize(
    "broken",
    [
        [[1, 2, 3]],
        [["a", "b", "c", "d", "e", "f"]],
        {"size": list(SIZE)},
        {"size": [5, 5], "counts": [25]},
        {"size": list(SIZE), "counts": "\u00e9"},
        "polygon",
        7,
    ],
)
def test_an_outline_that_does_not_decode_is_told_by_its_annotation(broken):
    annotations = objects_with(broken).annotations
    with pytest.raises(DataError, match=r"a\.png annotation 7: its segmentation does not decode") as caught:
        masks_of(annotations, annotations.objects(0), SIZE)
    assert "remove it" in str(caught.value.hint)


def test_objects_without_outline_are_counted():
    for segment, count in ((None, 1), ([], 1), (POLYGON, 0), (compressed(), 0)):
        assert without_outline(objects_with(segment).annotations) == count
    assert without_outline(load_shapes(count=3).annotations) == len(load_shapes(count=3).annotations.ids)


def test_outlines_are_read_only_when_asked_for():
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(BOX), "area": 48, "iscrowd": 0}
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 20}],
        "annotations": [annotation | {"segmentation": POLYGON}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    assert read_coco(document, "x.json")[0].segments is None
    assert read_coco(document, "x.json", masks=True)[0].segments is not None
    assert load_shapes(count=2).annotations.segments is None


@pytest.mark.parametrize("index", range(8))
def test_the_shapes_outlines_are_the_shapes(index):
    dataset = load_shapes("hard", count=8, masks=True)
    pictures = dataset.pictures
    assert isinstance(pictures, Shapes)
    masks = masks_of(dataset.annotations, dataset.annotations.objects(index), (128, 128))
    assert masks is not None
    for mask, thing in zip(masks, pictures.things(index), strict=True):
        painted = torch.zeros(128, 128)
        inside = torch.from_numpy(_coverage(thing.label, thing.side))
        painted[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] = inside
        overlap = (mask.bool() & (painted > 0.5)).sum() / (mask.bool() | (painted > 0.5)).sum()
        assert overlap > 0.85


def test_outlines_that_mean_nothing_are_found_and_removed_from_a_copy(coco_folder, tmp_path):
    """Training on boxes does not care; training on masks refuses them before it begins, or does without."""
    path = coco_folder / "annotations" / "instances_train2017.json"
    document = coco_document()
    runs = {"size": [48, 64], "counts": [48 * 64]}
    for row, outline in zip(document["annotations"], (POLYGON, [[1, 2, 3]], {**runs, "size": [5, 5]}, []), strict=False):  # fmt: skip
        row["segmentation"] = outline
    del document["images"][1]["height"]  # of the third object: the size is read from the picture
    path.write_text(json.dumps(document))
    (coco_folder / "annotations" / "instances_val2017.json").unlink()  # the same pictures would be a leak
    report = check(find(str(coco_folder)), fast=True)
    found = [str(defect) for defect in report.defects["train"].examples["bad-outline"]]
    assert found == [
        "a.jpg annotation 2: [[1, 2, 3]]",
        'grey.jpg annotation 5: {"size": [5, 5], "counts": [3072]}',
    ]
    write_coco(report.repaired(), tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "annotations" / "instances_train.json").read_text())
    kept = {row["id"]: row.get("segmentation") for row in written["annotations"]}
    assert kept == {1: POLYGON, 2: None, 5: None, 6: [], 9: None}
    assert not resolve(str(coco_folder), "train").defects.counts["bad-outline"]
    with pytest.raises(DataError, match=r"a\.jpg annotation 2: .*an outline that does not decode"):
        resolve(str(coco_folder), "train", masks=True)
    left = resolve(str(coco_folder), "train", masks=True, bad_data="skip")
    assert (left.defects.counts["bad-outline"], without_outline(left.annotations)) == (1, 3)


def test_a_written_data_set_keeps_its_outlines():
    document = load_shapes(count=3, masks=True).to_coco()
    annotations, *_ = read_coco(document, "x.json", masks=True)
    assert without_outline(annotations) == 0
    assert "segmentation" not in load_shapes(count=3).to_coco()["annotations"][0]
