"""`detr eval` from the outside: numbers, files, exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jsonschema
import pytest

from detrcli import api
from detrcli.data.shapes import load_shapes
from detrcli.errors import DataError, UsageError
from detrcli.evaluate import coco
from detrcli.evaluate.coco import METRICS
from tests import commands
from tests.cli.run import detr as process
from tests.evaluate.conftest import painted
from tests.spotter import spotter
from tests.tiny import write_run

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/eval.schema.json").read_text())


@pytest.fixture
def detr(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: commands.detr("eval", *args, capsys=capsys, monkeypatch=monkeypatch)


@pytest.fixture
def truth(tmp_path):
    """A COCO file whose pictures are not there: scoring saved detections needs none."""
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(painted(5).to_coco()))
    return path


def perfect(truth: Path, **changes) -> list[dict]:
    document = json.loads(truth.read_text())
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        | changes
        for a in document["annotations"]
    ]


def saved(tmp_path: Path, rows: object) -> Path:
    path = tmp_path / "dets.json"
    path.write_text(json.dumps(rows))
    return path


def test_saved_detections_are_scored_without_a_model(detr, truth, tmp_path):
    ended = detr(truth, "--detections", saved(tmp_path, perfect(truth)), "--json", "--out", "out")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    jsonschema.validate(document, SCHEMA)
    assert document["metrics"]["ap"] == pytest.approx(1)
    assert document["split"] == "train"  # the only one there is
    assert [c["name"] for c in document["classes"]] == ["red spot", "blue spot"]
    jsonschema.validate(json.loads(Path("out/metrics.json").read_text()), SCHEMA)
    with open("out/classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["ap"]) for r in rows] == [c["ap"] for c in document["classes"]]
    again = detr(truth, "--detections", "out/detections.json", "--json", "--out", "again")
    assert json.loads(again.out)["metrics"] == document["metrics"]


def test_the_tables_show_what_was_measured(detr, truth, tmp_path):
    ended = detr(
        truth, "--detections", saved(tmp_path, perfect(truth)), "--per-class", "--scorer", "pycocotools"
    )
    assert ended.code == 0
    assert "AP50" in ended.out
    assert "100.0" in ended.out
    assert "red spot" in ended.out
    assert "scored by pycocotools" in ended.err
    assert "runs" in ended.err


def test_a_limit_takes_the_first_images_of_saved_detections_too(detr, truth, tmp_path):
    first = [image["id"] for image in json.loads(truth.read_text())["images"][:3]]
    dets = saved(
        tmp_path, [row | {"score": 0.9 if row["image_id"] in first else 0.95} for row in perfect(truth)]
    )
    ended = detr(truth, "--detections", dets, "--limit", 3, "--json", "--out", "out")
    document = json.loads(ended.out)
    jsonschema.validate(document, SCHEMA)
    assert (document["images"], document["limit"]) == (3, 3)
    assert document["metrics"]["ap"] == pytest.approx(1)
    assert {row["image_id"] for row in json.loads(Path("out/detections.json").read_text())} <= {*first}
    strange = detr(truth, "--detections", saved(tmp_path, perfect(truth, image_id=999)), "--limit", 3)
    assert "1 images are not in the ground truth: 999" in strange.err


def predicted(tmp_path: Path, truth: Path, changed: dict[int, str]) -> Path:
    """What `detr predict --format coco` saves: ids of its own for pictures and classes, names beside them."""
    document = json.loads(truth.read_text())
    files = {im["id"]: f"data/train/{changed.get(im['id'], im['file_name'])}" for im in document["images"]}
    own = {image: len(files) * 10 - image for image in files}  # each is the data's id of another picture
    rows = [
        row | {"image_id": own[row["image_id"]], "category_id": row["category_id"] + 100}
        for row in perfect(truth)
    ]
    key = {
        "images": [{"id": own[image], "file_name": name} for image, name in files.items()],
        "categories": [{"id": c["id"] + 100, "name": c["name"]} for c in document["categories"]],
    }
    (tmp_path / "coco_images.json").write_text(json.dumps(key))
    return saved(tmp_path, rows)


def test_what_predict_saved_is_matched_by_names(detr, truth, tmp_path):
    ended = detr(truth, "--detections", predicted(tmp_path, truth, {}), "--json", "--out", "out")
    document = json.loads(ended.out)
    assert document["metrics"]["ap"] == pytest.approx(1)
    assert "matched with the data by their names in coco_images.json" in document["notes"][0]
    (tmp_path / "elsewhere").mkdir()
    again = detr(truth, "--detections", Path("out/detections.json").rename("elsewhere/d.json"), "--json")
    assert json.loads(again.out)["metrics"] == document["metrics"]


def test_pictures_that_the_data_does_not_have_by_name_are_an_error(detr, truth, tmp_path):
    number = perfect(truth)[0]["image_id"]
    dets = predicted(tmp_path, truth, {number: "strange.png"})
    ended = detr(truth, "--detections", dets)
    assert ended.code == 3
    assert "1 of " in ended.err
    assert "the first: data/train/strange.png" in ended.err
    assert "--split" in ended.err
    others = [n for n in {row["image_id"] for row in perfect(truth)} if n != number]
    ended = detr(truth, "--detections", predicted(tmp_path, truth, {number: f"x/{others[0]}.png"}))
    assert ended.code == 3
    assert "would be the same picture" in ended.err
    (tmp_path / "coco_images.json").write_text(
        '{"images": [], "categories": [{"id": 1, "name": "red spot"}]}'
    )
    ended = detr(truth, "--detections", dets)
    assert ended.code == 3
    assert "of the detections beside it is not in it" in ended.err


def test_what_comes_last_is_checked_before_the_model_works(detr, tmp_path, monkeypatch):
    worked = []
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: worked.append(True))
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments = ("shapes", "--model", "detr/tiny", "--weights", write_run(tmp_path / "run"))
    ended = detr(*arguments, "--out", "full")
    assert ended.code == 1
    assert "never overwritten" in ended.err
    ended = detr(*arguments, "--scorer", "ultrafast")
    assert ended.code == 2
    assert "scorer is not installed" in ended.err
    monkeypatch.setenv("DETR_RUNS", str(tmp_path / "full" / "file"))
    ended = detr(*arguments)
    assert ended.code == 1
    assert "cannot make files in" in ended.err
    assert "DETR_RUNS" in ended.err
    assert not worked


def test_results_are_never_overwritten(detr, truth, tmp_path):
    dets = saved(tmp_path, perfect(truth))
    assert detr(truth, "--detections", dets, "--out", "out").code == 0
    ended = detr(truth, "--detections", dets, "--out", "out")
    assert ended.code == 1
    assert "never overwritten" in ended.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_id": 999}, "1 images are not in the ground truth: 999"),
        ({"category_id": 999}, "1 categories are not in the ground truth: 999"),
        ({"score": float("nan")}, "finite number as 'score'"),
        ({"bbox": [1, 1, -5, 5]}, "negative size"),
    ],
)
def test_detections_that_cannot_be_scored_are_a_data_error(detr, truth, tmp_path, changes, said):
    ended = detr(truth, "--detections", saved(tmp_path, perfect(truth, **changes)))
    assert ended.code == 3
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_damaged_ground_truth_is_a_data_error_with_names(detr, truth, tmp_path):
    dets = saved(tmp_path, perfect(truth))
    document = json.loads(truth.read_text())
    document["annotations"][1]["bbox"][0] = float("nan")
    truth.write_text(json.dumps(document))
    ended = detr(truth, "--detections", dets)
    assert ended.code == 3
    assert str(document["annotations"][1]["id"]) in ended.err
    truth.write_text(json.dumps(document)[:200])
    assert detr(truth, "--detections", dets).code == 3


def test_empty_ground_truth_is_said(detr, truth, tmp_path):
    document = json.loads(truth.read_text()) | {"annotations": []}
    truth.write_text(json.dumps(document))
    ended = detr(truth, "--detections", saved(tmp_path, []))
    assert ended.code == 3
    assert "no" in ended.err
    assert "object" in ended.err


def test_cut_and_missing_files_and_corner_boxes_are_said(detr, truth, tmp_path):
    dets = saved(tmp_path, perfect(truth))
    dets.write_text(dets.read_text()[:-20])
    ended = detr(truth, "--detections", dets)
    assert ended.code == 3
    assert "not whole JSON" in ended.err
    assert detr(truth, "--detections", tmp_path / "gone.json").code == 3
    corners = perfect(truth)
    for row in corners:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]
    ended = detr(truth, "--detections", saved(tmp_path, corners))
    assert ended.code == 0
    assert "look like x1, y1, x2, y2" in ended.err


def test_either_a_model_or_detections(detr, truth, tmp_path):
    dets = saved(tmp_path, [])
    assert detr(truth).code == 2
    assert detr(truth, "--detections", dets, "--model", "detr").code == 2
    assert detr(truth, "--model", "dter").code == 2


@pytest.mark.parametrize(
    "option",
    [("--batch-size", 2), ("--amp", "bf16"), ("--device", "cpu"), ("--devices", 2), ("--workers", 1)],
)  # fmt: skip
def test_options_for_models_are_refused_where_none_runs(detr, truth, tmp_path, option):
    ended = detr(truth, "--detections", saved(tmp_path, perfect(truth)), *option)
    assert ended.code == 2
    assert f"{option[0]} is for models" in ended.err


def test_every_option_reaches_the_evaluation(detr, monkeypatch, tmp_path):
    seen = {}

    def evaluate(data, model, **options):
        seen.update(options, data=data, model=model)
        raise DataError("that is all")

    monkeypatch.setattr(api, "evaluate", evaluate)
    options = {
        "weights": str(write_run(tmp_path / "run")), "split": "test", "data_root": tmp_path, "batch_size": 3, "workers": 2,
        "device": "cpu", "devices": 2, "amp": "bf16", "limit": 7, "scorer": "pycocotools",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert detr("shapes", "--model", "detr/tiny", *flags).code == 3
    del seen["progress"]
    assert seen == options | {"data": "shapes", "model": "detr/tiny", "amp": True}


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A run of detr/tiny, where the command looks for runs."""
    monkeypatch.setenv("DETR_RUNS", str(tmp_path / "runs"))
    return write_run(tmp_path / "runs" / "train" / "detr-tiny-1")


def test_a_model_is_scored_and_can_be_scored_again(shapes, detr):
    ended = detr(
        "shapes", "--model", "detr/tiny", "--limit", "4", "--batch-size", "2", "--json", "--out", "out"
    )
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    jsonschema.validate(document, SCHEMA)
    assert document["images"] == document["limit"] == 4
    assert document["split"] == "val"
    assert document["batch_size"] == 2
    assert "newest finished run of detr/tiny" in document["weights"]
    assert list(document["metrics"]) == list(METRICS)
    rows = json.loads(Path("out/detections.json").read_text())
    ids = load_shapes("easy", "val").annotations.image_ids[:4].tolist()
    assert {row["image_id"] for row in rows} == set(ids)
    again = json.loads(detr("shapes", "--detections", "out/detections.json", "--limit", 4, "--json").out)
    assert again["metrics"] == document["metrics"]
    assert again["images"] == 4


@pytest.mark.long
def test_two_processes_give_what_one_gives(shapes, detr, tmp_path):
    arguments = ("shapes", "-m", "detr/tiny", "--limit", "5", "--json", "--out")
    one = detr(*arguments, "one")
    two = process("eval", *arguments, "two", "--devices", "2", cwd=tmp_path)
    assert one.code == two.code == 0, two.err
    assert json.loads(one.out)["metrics"] == two.json["metrics"]
    assert Path("one/detections.json").read_text() == Path("two/detections.json").read_text()


def test_a_model_that_never_saw_padding_says_so(detr):
    """Said before its weights are looked for, which are not here."""
    ended = detr("shapes", "--model", "detr/r50-dc5", "--weights", "gone.safetensors")
    assert ended.code == 4
    ended = detr("shapes", "--model", "detr/r50-dc5", "--batch-size", "2", "--device", "nowhere")
    assert "padding" not in ended.err
    ended = detr("shapes", "--model", "detr/r50-dc5", "--device", "nowhere")
    assert ended.code == 2
    assert "saw no padding in training: batches of 1" in ended.err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"batch_size": -1}, "batch_size must be 1 or more"),
        ({"devices": 0}, "devices must be 1 or more"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"scorer": "x"}, "unknown scorer 'x'"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_a_model_is_loaded(dataset, monkeypatch, option, said):
    loaded = []
    monkeypatch.setattr(api, "load", lambda *_, **__: loaded.append(True))
    with pytest.raises(UsageError, match=said):
        api.evaluate(dataset, "any", **option)
    assert not loaded


def test_a_model_that_insists_on_single_images_gets_them(dataset, monkeypatch):
    predictor = spotter(only_batch=1)
    monkeypatch.setattr(api, "load", lambda *a, **k: predictor)
    assert api.evaluate(dataset, "any").batch_size == 1
    assert {size[0] for size in predictor.model.sizes} == {1}
    assert api.evaluate(dataset, "any", batch_size=3).batch_size == 3
    assert 3 in {size[0] for size in predictor.model.sizes}
