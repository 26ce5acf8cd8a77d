"""What predict writes: each form holds the same detections, and can be read by those it is for."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jsonschema
import numpy as np
import pytest
from PIL import Image

from detrcli.errors import DetrError, UsageError
from detrcli.predict.result import Failure
from detrcli.predict.writers import FORMS, JsonLines, Outputs, Target, check_forms
from detrcli.types import Categories
from tests.spotter import CATEGORIES, RED, scene, spotter

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/predict.schema.json").read_text())


def write(outputs, results, *failures):
    try:
        for result in results:
            outputs.write(result)
    finally:
        outputs.close([*failures])


@pytest.fixture
def written(tmp_path):
    """Everything that a run over three pictures writes, two of them of one name."""
    folder = tmp_path / "out"
    sources = []
    for name, size in (("a/x.jpg", (320, 240)), ("b/x.png", (320, 240)), ("000000000139.png", (100, 60))):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        scene(size).save(path)
        sources.append(path)
    outputs = Outputs.in_folder(
        Target(folder, CATEGORIES, {"model": "spotter/plain", "weights": "hand"}), list(FORMS)
    )
    results = list(spotter().predict(sources))
    write(outputs, results, Failure("gone.png", 3, "gone.png: no such file"))
    return SimpleNamespace(folder=folder, results=results)


def test_pictures_are_drawn_once_each_in_their_own_format(written):
    assert {p.name for p in written.folder.glob("*.[jp][pn]g")} == {"x.jpg", "x-2.png", "000000000139.png"}
    with Image.open(written.folder / "x.jpg") as picture:
        assert picture.size == (640, 480)  # enlarged: labels need room
        assert picture.format == "JPEG"


def test_json_documents_follow_the_published_schema(written):
    document = json.loads((written.folder / "predictions.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert [image["source"] for image in document["images"]] == [r.source for r in written.results]
    assert document["images"][0]["detections"][0]["name"] in CATEGORIES.names
    assert document["failures"] == [{"source": "gone.png", "error": "gone.png: no such file"}]
    lines = [json.loads(line) for line in (written.folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, SCHEMA)
    assert [{k: v for k, v in line.items() if k != "schema_version"} for line in lines[:3]] == document[
        "images"
    ]
    assert lines[3]["error"] == "gone.png: no such file"


def test_a_document_that_breaks_the_schema_is_noticed(written):
    document = json.loads((written.folder / "predictions.json").read_text())
    document["images"][0]["detections"][0]["box"].pop()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_coco_results_refer_to_the_images_file(written):
    rows = json.loads((written.folder / "coco_results.json").read_text())
    document = json.loads((written.folder / "coco_images.json").read_text())
    ids = {image["id"]: image["file_name"] for image in document["images"]}
    assert ids[139].endswith("000000000139.png")
    assert len(ids) == 3
    assert {row["image_id"] for row in rows} <= set(ids)
    assert {c["id"]: c["name"] for c in document["categories"]} == dict(
        zip(CATEGORIES.ids, CATEGORIES.names, strict=True)
    )
    first = written.results[0].detections[0]
    assert rows[0]["bbox"] == [
        first.box[0],
        first.box[1],
        first.box[2] - first.box[0],
        first.box[3] - first.box[1],
    ]


def test_a_file_whose_name_is_a_number_keeps_it_whatever_came_before(tmp_path):
    names = ["a.png", "1.png", "2.png", "b.png", "in/1.png", "01.png", f"{10**15}.png", f"{10**15 - 1}.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        scene((40, 30), ()).save(tmp_path / name)
    outputs = Outputs.in_folder(Target(tmp_path / "out", CATEGORIES), ["coco"])
    write(outputs, spotter().predict([tmp_path / name for name in names]))
    images = json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"]
    ids = {str(Path(image["file_name"]).relative_to(tmp_path)): image["id"] for image in images}
    others = {name: 10**15 + names.index(name) for name in names}
    assert ids == others | {"1.png": 1, "2.png": 2, f"{10**15 - 1}.png": 10**15 - 1}
    assert len(set(ids.values())) == len(names)


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full, on this system"
)
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("json", "predictions.json"),
        ("jsonl", "predictions.jsonl"),
        ("coco", "coco_images.json"),
        ("csv", "predictions.csv"),
        ("image", "image.png"),
        ("yolo", "labels/image.txt"),
    ],
)
def test_a_full_disk_is_said(tmp_path, form, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/dev/full")
    outputs = Outputs.in_folder(Target(tmp_path, CATEGORIES), [form, "json"])
    result = replace(next(spotter().predict(scene())), source="image")
    with pytest.raises(DetrError, match=f"cannot write in {tmp_path}: No space left on device") as caught:
        write(outputs, [result])
    assert "free some space" in caught.value.hint


def test_yolo_lines_are_relative_centres(written):
    assert (written.folder / "classes.txt").read_text().splitlines() == list(CATEGORIES.names)
    for name, result in zip(("x", "x-2", "000000000139"), written.results, strict=True):
        lines = (written.folder / "labels" / f"{name}.txt").read_text().splitlines()
        assert len(lines) == len(result)
        for line, found in zip(lines, result.detections, strict=True):
            label, cx, cy, w, h, score = map(float, line.split())
            assert CATEGORIES.ids[int(label)] == found.category_id
            x1, y1 = (cx - w / 2) * result.width, (cy - h / 2) * result.height
            assert (x1, y1, score) == pytest.approx((*found.box[:2], found.score), abs=1e-3)


def test_csv_has_a_row_a_detection(written):
    with (written.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, written.results))
    assert float(rows[0]["x2"]) == pytest.approx(written.results[0].detections[0].box[2], abs=1e-3)


def test_crops_are_the_original_pixels(written):
    [red] = (written.folder / "crops" / "red spot").glob("x-2-*.png")
    with Image.open(red) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (60, 60, 3)
    assert (pixels == RED).all()


def test_records_say_what_the_files_of_a_picture_are_called(written, tmp_path):
    images = json.loads((written.folder / "predictions.json").read_text())["images"]
    assert [image["stem"] for image in images] == ["x", "x-2", "000000000139"]
    outputs = Outputs.in_folder(Target(tmp_path / "plain", CATEGORIES), ["json", "coco"])
    write(outputs, written.results)
    assert "stem" not in json.loads((tmp_path / "plain" / "predictions.json").read_text())["images"][0]


def test_pictures_of_one_name_get_numbers_that_are_free(tmp_path):
    names = ["x.png", "a/x.png", "x-3.png", "b/X.png", "c/x.png"]
    outputs = Outputs.in_folder(Target(tmp_path / "out", CATEGORIES), ["yolo"])
    [result] = spotter().predict(scene())
    stems = [outputs.write(replace(result, source=name)) for name in names]
    assert stems == ["x", "x-2", "x-3", "X-4", "x-5"]
    looked = []  # for many of one name, each number is tried once
    outputs._names.taken = type("Taken", (set,), {"__contains__": lambda s, n: looked.append(n)})()
    for _ in range(50):
        outputs.write(result)
    assert len(looked) == 50


@pytest.mark.parametrize("names", [("Cabinet/shelf", "Desk/shelf"), ("..", "."), ("A", "a"), ("a/b", "a_b")])
def test_crops_of_each_class_have_a_folder_of_their_own(tmp_path, names):
    outputs = Outputs.in_folder(Target(tmp_path / "out", Categories((3, 17), names)), ["crops"])
    write(outputs, spotter(categories=Categories((3, 17), names)).predict(scene()))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["crops"]
    folders = list((tmp_path / "out" / "crops").iterdir())
    assert len(folders) == 2
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)


def test_unknown_forms_and_unwritable_places_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'jsn'") as caught:
        check_forms(["json", "jsn"])
    assert "json" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(DetrError, match="cannot write"):
        Outputs.in_folder(Target(tmp_path / "file" / "out", CATEGORIES), ["json"])


@pytest.mark.parametrize(
    "name",
    ["ünïcödé 猫.png", "new\nline.png", "tab\t.png", ".hidden.png", "a" * 240 + ".png", "qu'o\"te*?.png"],
)
def test_any_file_name_becomes_files_and_stays_in_the_json(tmp_path, name):
    path = tmp_path / name
    scene().save(path)
    outputs = Outputs.in_folder(
        Target(tmp_path / "out", CATEGORIES, {"model": "m", "weights": "w"}), list(FORMS)
    )
    write(outputs, spotter().predict([path]))
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert document["images"][0]["source"] == str(path)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 1


def test_lines_come_as_each_picture_finishes():
    lines = []
    sink = SimpleNamespace(write=lines.append, flush=lambda: None)
    writer = JsonLines(sink)
    for number, result in enumerate(spotter().predict([scene()] * 3), 1):
        writer.write(result)
        assert len(lines) == number


def test_supervision_takes_what_it_is_given():
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    [result] = spotter().predict(scene())
    given = result.to_supervision()
    assert isinstance(given, supervision.Detections)
    assert len(given) == len(result.detections)
    assert len(given.with_nms(0.5)) <= len(given)
    assert [given[i].data["class_name"][0] for i in range(len(given))] == [d.name for d in result.detections]


def test_supervision_gets_corners_scores_and_names(monkeypatch):
    [result] = spotter().predict(scene())
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UsageError, match="not installed"):
        result.to_supervision()
    package = ModuleType("supervision")
    package.Detections = SimpleNamespace
    monkeypatch.setitem(sys.modules, "supervision", package)
    given = result.to_supervision()
    assert given.xyxy.shape == (2, 4)
    assert given.class_id.tolist() == [d.category_id for d in result.detections]
    assert given.data["class_name"].tolist() == [d.name for d in result.detections]
