from __future__ import annotations

import json
import multiprocessing
import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from detrcli.data.annotations import Builder, Strings
from detrcli.data.catalog import resolve
from detrcli.data.formats.coco import read_coco
from detrcli.data.shapes import load_shapes

from .miniature import coco_document


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_packed_strings_are_the_strings(strings):
    packed = Strings.pack(strings)
    assert list(packed) == strings
    assert packed[:] == strings


def test_rows_are_grouped_by_image_whatever_the_order_of_adding():
    builder = Builder()
    for image in (11, 12, 13):
        builder.image(image, f"{image}.jpg", 10, 10)
    for image, key in ((2, 5), (0, 6), (2, 7), (0, 8)):
        builder.add(image, key, 1, (0, 0, key, 2))
    annotations = builder.build()
    assert [annotations.ids[annotations.objects(i).rows].tolist() for i in range(3)] == [[6, 8], [], [5, 7]]
    assert annotations.areas.tolist() == [12, 16, 10, 14]


def test_coco_goes_in_and_comes_out_with_its_own_ids(coco_folder):
    dataset = resolve(str(coco_folder), "val")
    document = dataset.to_coco()
    expected = coco_document()
    assert dataset.categories.ids == (3, 17, 90)
    assert dataset.categories.names == ("cat", "dog", "tooth brush")
    assert document["categories"] == expected["categories"]
    assert [i["id"] for i in document["images"]] == [42, 7, 100, 9]
    by_id = {a["id"]: a for a in document["annotations"]}
    assert by_id == {a["id"]: {**a, "bbox": list(map(float, a["bbox"]))} for a in expected["annotations"]}


def test_selected_images_keep_their_pictures_and_objects(coco_folder):
    dataset = resolve(str(coco_folder), "train")
    some = dataset.select([2, 0])
    assert some.annotations.image_ids.tolist() == [100, 42]
    assert some.annotations.objects(1).boxes.tolist() == dataset.annotations.objects(0).boxes.tolist()
    assert (some.picture(0) == dataset.picture(2)).all()


def test_pickling_keeps_everything():
    annotations = load_shapes(count=5).annotations
    copy = pickle.loads(pickle.dumps(annotations))
    assert np.array_equal(copy.boxes, annotations.boxes)
    assert list(copy.names) == list(annotations.names)


def _change(annotations, done):
    annotations.boxes[0] = 77
    annotations.segments.text[0] = ord("7")
    done.set()


def test_a_spawned_process_maps_the_shared_arrays_instead_of_copying():
    document = coco_document()
    for a in document["annotations"]:
        a["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    annotations = read_coco(document, "x.json", masks=True)[0].shared()
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    process = context.Process(target=_change, args=(annotations, done))
    process.start()
    assert done.wait(60)
    process.join()
    assert annotations.boxes[0].tolist() == [77] * 4  # only a common page shows the other process's writing
    assert annotations.segments[0].startswith("7")
    assert json.loads(annotations.segments[1]) == [[0, 0, 5, 0, 5, 5]]
