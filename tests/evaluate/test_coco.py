"""The twelve numbers are pycocotools', whatever computes them, and nothing that would falsify them gets through."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detrcli.errors import DataError, UsageError
from detrcli.evaluate import coco
from detrcli.evaluate.coco import METRICS, choose_backend, score
from detrcli.evaluate.tables import DetectionTable, TruthTable, read_json

BACKENDS = ("pycocotools", "ultrafast")
CATEGORY_IDS = np.array([1, 4, 90])
EDGES = (32.0, 96.0)  # square roots of the areas that part small, medium and large


def adversarial(seed: int, images: int, crowded: bool) -> tuple[TruthTable, DetectionTable]:
    """Crowds, tied scores, more than 100 detections of a class, areas on the borders of the bins, images without anything."""
    rng = np.random.default_rng(seed)
    image_ids = np.sort(rng.choice(10_000, images, replace=False))
    objects = int(rng.integers(1, 6 * images))
    side = rng.choice([*EDGES, 5.0, 40.0, 200.0], (objects, 2))
    boxes = np.concatenate([rng.integers(0, 400, (objects, 2)), side], 1).astype(float)
    truth = TruthTable(
        image_ids=image_ids,
        sizes=np.full((images, 2), 640),
        category_ids=CATEGORY_IDS,
        names=("a", "b", "c"),
        object_images=rng.integers(0, images, objects),
        object_categories=rng.integers(0, 3, objects),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3] * rng.choice([1.0, 0.5], objects),
        crowd=rng.random(objects) < (0.3 if crowded else 0.0),
    )
    repeats = int(rng.integers(0, 4)) + (130 if seed % 5 == 0 and images < 4 else 0)
    rows = np.repeat(np.arange(objects), repeats)
    jitter = rng.normal(0, rng.choice([0.0, 2.0, 8.0]), (len(rows), 4))
    found = boxes[rows] + jitter
    found[:, 2:] = np.abs(found[:, 2:])
    right = rng.random(len(rows)) < 0.9
    labels = np.where(right, truth.object_categories[rows], rng.integers(0, 3, len(rows)))
    order = rng.permutation(len(rows))
    return truth, DetectionTable(
        image_ids[truth.object_images[rows]],
        CATEGORY_IDS[labels],
        rng.integers(0, 8, len(rows)) / 8,  # ties
        found,
    ).rows(order)


def by_the_book(truth: TruthTable, detections: DetectionTable) -> list[float]:
    """pycocotools the way its own demo uses it, from JSON."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {
            "id": i + 1,
            "image_id": int(truth.image_ids[truth.object_images[i]]),
            "category_id": int(truth.category_ids[truth.object_categories[i]]),
            "bbox": truth.boxes[i].tolist(),
            "area": float(truth.areas[i]),
            "iscrowd": int(truth.crowd[i]),
        }
        for i in range(len(truth.boxes))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": int(i)} for i in truth.image_ids],
            "categories": [{"id": int(i)} for i in truth.category_ids],
            "annotations": annotations,
        }
        known.createIndex()
        evaluator = COCOeval(known, known.loadRes(list(detections.to_coco())), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_twelve_numbers_are_those_of_pycocotools(seed, images, crowded):
    truth, detections = adversarial(seed, images, crowded)
    results = [score(truth, detections, backend=backend) for backend in BACKENDS]
    if len(detections):
        expected = by_the_book(truth, detections)
        for result in results:
            assert list(result.metrics) == list(METRICS)
            np.testing.assert_allclose(list(result.metrics.values()), expected, rtol=0, atol=1e-12)
    assert results[0].classes == results[1].classes


def test_more_than_a_hundred_detections_of_a_class_count_as_pycocotools_counts_them():
    truth, detections = adversarial(5, 2, crowded=True)
    assert np.unique(detections.image_ids, return_counts=True)[1].max() > 300
    for backend in BACKENDS:
        result = score(truth, detections, backend=backend)
        np.testing.assert_allclose(
            list(result.metrics.values()), by_the_book(truth, detections), rtol=0, atol=1e-12
        )


def one_object() -> tuple[TruthTable, DetectionTable]:
    box = np.array([[10.0, 10.0, 40.0, 40.0]])
    truth = TruthTable(
        np.array([7]), np.array([[100, 100]]), np.array([3]), ("thing",), np.array([0]), np.array([0]), box,
        np.array([1600.0]), np.array([False]),
    )  # fmt: skip
    return truth, DetectionTable(np.array([7]), np.array([3]), np.array([0.5]), box)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perfect_answer_scores_one_and_none_scores_zero(backend):
    truth, found = one_object()
    perfect, nothing = (
        score(truth, found, backend=backend),
        score(truth, DetectionTable.empty(), backend=backend),
    )
    for value in (perfect.metrics["ap"], perfect.metrics["ar1"], perfect.classes[0].metrics["ap_medium"]):
        assert value == pytest.approx(1, abs=1e-12)
    assert perfect.metrics["ap_large"] == nothing.metrics["ap_large"] == -1
    assert nothing.metrics["ap"] == nothing.metrics["ar100"] == 0
    assert "no detections" in nothing.notes[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_images_does_not_matter(backend):
    truth, detections = adversarial(3, 6, crowded=True)
    images = np.random.default_rng(0).permutation(truth.image_ids)
    dealt = [detections.rows(np.flatnonzero(detections.image_ids == i)) for i in images]
    shuffled = DetectionTable.concatenate(dealt)
    assert len(shuffled) == len(detections) > 0
    assert score(truth, shuffled, backend=backend) == score(truth, detections, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scorers_do_not_talk(backend, capfd):
    score(*adversarial(1, 3, crowded=False), backend=backend)
    assert capfd.readouterr().out == ""


def test_a_class_gets_its_own_numbers():
    truth, found = one_object()
    truth = replace(truth, category_ids=np.array([3, 8]), names=("thing", "other"))
    first, second = score(truth, found).classes
    assert (first.category_id, first.name, first.objects, first.detections) == (3, "thing", 1, 1)
    assert first.metrics["ap"] == pytest.approx(1)
    assert (second.objects, second.metrics["ap"]) == (0, -1)


def test_the_fast_scorer_is_chosen_when_installed(monkeypatch):
    assert choose_backend() == "ultrafast"
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    assert choose_backend() == "pycocotools"
    with pytest.raises(UsageError, match="not installed") as refused:
        choose_backend("ultrafast")
    assert "--scorer pycocotools" in str(refused.value.hint)


def row(**changes):
    return {"image_id": 7, "category_id": 3, "bbox": [10, 10, 40, 40], "score": 0.5} | changes


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(image_id=8)], r"1 images are not in the ground truth: 8"),
        ([row(category_id=4)], r"1 categories are not in the ground truth: 4"),
        ([row(score=float("nan"))], r"finite number as 'score': number 0"),
        ([row(), row(bbox=[0, 0, float("nan"), 1])], r"four finite numbers as 'bbox': number 1"),
        ([row(bbox=[0, 0, float("inf"), 1])], "four finite"),
        ([row(bbox=[10, 10, -4, 4])], r"negative size.*images 7"),
        ([row(bbox=[1, 2, 3])], "four finite"),
        ([row(bbox=["1", "2", "3", "4"])], "four finite"),
        ([row(image_id="7")], "whole number as 'image_id'"),
        ([row(image_id=7.5)], "whole number as 'image_id'"),
        ([row(image_id=10**400)], "whole number as 'image_id'"),
        ([row(category_id=True)], "whole number as 'category_id'"),
        ([row(score=None)], "finite number as 'score'"),
        ([{}], "as 'image_id'"),
        ([3], "as 'image_id'"),
        ({"annotations": []}, "not a list"),
        (None, "not a list"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows, said):
    with pytest.raises(DataError, match=said):
        DetectionTable.from_coco(rows).check_against(one_object()[0])


def test_corner_boxes_given_as_xywh_are_recognised():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 100, (50, 2, 2)), axis=1).reshape(50, 4)
    truth = one_object()[0]
    ids = np.full(50, 7), np.full(50, 3)
    wrong = DetectionTable(*ids, np.ones(50), corners)
    right = replace(wrong, boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1))
    assert "look like x1, y1, x2, y2" in score(truth, wrong).notes[0]
    assert not score(truth, right).notes


finite = st.floats(allow_nan=False, allow_infinity=False, width=64).filter(lambda x: abs(x) < 2**62)
tables = st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(0, 90), finite, st.lists(finite, min_size=4, max_size=4)),
    max_size=6,
)


@given(tables)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saved_detections_come_back_to_the_last_bit(tmp_path, rows):
    table = DetectionTable.from_coco(
        [{"image_id": i, "category_id": c, "score": s, "bbox": b} for i, c, s, b in rows]
    )
    table.write(tmp_path / "d.json")
    again = DetectionTable.read(tmp_path / "d.json")
    for name in ("image_ids", "category_ids", "scores", "boxes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["image_id", "category_id", "bbox", "score", "x"]), inner, max_size=5
        )
    ),
    max_leaves=25,
)


@given(values)
@settings(max_examples=150, deadline=None)
def test_any_json_is_read_or_refused_with_our_error(document):
    with contextlib.suppress(DataError):
        DetectionTable.from_coco(document).check_against(one_object()[0])


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_with_our_error(tmp_path, data):
    path = tmp_path / "any.json"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        DetectionTable.read(path)


@pytest.mark.parametrize(
    "document", [{"annotations": []}, {"info": 1}, 3, None, [[]], {"a": row()}, row(), [[row()]]]
)
def test_a_file_of_something_else_is_refused_not_scored_as_empty(tmp_path, document):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"not a list|as 'image_id'"):
        DetectionTable.read(path)


def test_files_that_are_no_json_say_where_they_break(tmp_path):
    path: Path = tmp_path / "cut.json"
    path.write_text(json.dumps([row()])[:-10])
    with pytest.raises(DataError, match=r"not whole JSON: .* line 1, column"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "missing.json")
