"""The twelve COCO numbers, over all classes and for each.

pycocotools is the reference; ultrafast-pycocotools (extra `eval`) gives the same curves bit by bit in a hundredth of the time
and is used when it is installed. Both answer precision and recall curves; the means are taken here, in one place.

A number is -1 where nothing could be measured (no large object in the data, say), as pycocotools has it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detrcli.errors import UsageError
from detrcli.evaluate.tables import DetectionTable, Floats, TruthTable

Backend = Literal["auto", "pycocotools", "ultrafast"]

AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}
MAX_DETECTIONS = {1: 0, 10: 1, 100: 2}
IOU_THRESHOLDS = {None: slice(None), 0.5: slice(0, 1), 0.75: slice(5, 6)}

PRECISIONS: dict[str, tuple[float | None, str]] = {
    "ap": (None, "all"),
    "ap50": (0.5, "all"),
    "ap75": (0.75, "all"),
    "ap_small": (None, "small"),
    "ap_medium": (None, "medium"),
    "ap_large": (None, "large"),
}
RECALLS: dict[str, tuple[str, int]] = {
    "ar1": ("all", 1),
    "ar10": ("all", 10),
    "ar100": ("all", 100),
    "ar_small": ("small", 100),
    "ar_medium": ("medium", 100),
    "ar_large": ("large", 100),
}
METRICS = (*PRECISIONS, *RECALLS)  # in pycocotools' order


@dataclass(frozen=True, slots=True)
class Curves:
    """What matching gives, -1 where nothing could be measured."""

    precision: Floats  # (T, R, K, A, M): IoU thresholds, recall levels, classes, areas, detections an image
    recall: Floats  # (T, K, A, M)

    def metrics(self, classes: int | slice = slice(None)) -> dict[str, float]:
        """The twelve numbers over these class rows."""
        values = {
            name: _mean(self.precision[IOU_THRESHOLDS[iou], :, classes, AREAS[area], MAX_DETECTIONS[100]])
            for name, (iou, area) in PRECISIONS.items()
        }
        for name, (area, count) in RECALLS.items():
            values[name] = _mean(self.recall[:, classes, AREAS[area], MAX_DETECTIONS[count]])
        return values


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    category_id: int
    name: str
    objects: int  # in the ground truth, crowds aside
    detections: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class CocoMetrics:
    """The result of scoring detections against ground truth."""

    metrics: dict[str, float]  # METRICS, in order
    classes: tuple[ClassMetrics, ...]  # by category id
    backend: str
    notes: tuple[str, ...] = ()  # what looked suspicious, in words


def score(
    truth: TruthTable, detections: DetectionTable, *, backend: Backend = "auto", where: str = "detections"
) -> CocoMetrics:
    """Score detections; what cannot be scored is a DataError, never a wrong number."""
    notes = detections.check_against(truth, where)
    chosen = choose_backend(backend)
    curves = (_ultrafast if chosen == "ultrafast" else _pycocotools)(truth, detections)
    return CocoMetrics(curves.metrics(), tuple(_by_class(truth, detections, curves)), chosen, tuple(notes))


def choose_backend(wanted: Backend = "auto") -> Literal["pycocotools", "ultrafast"]:
    """The scorer to use: the fast one when it is installed."""
    installed = importlib.util.find_spec("ultrafast_pycocotools") is not None
    if wanted == "ultrafast" and not installed:
        raise UsageError(
            "the ultrafast scorer is not installed",
            hint="pip install 'detrcli[eval]', or --backend pycocotools",
        )
    if wanted == "auto":
        return "ultrafast" if installed else "pycocotools"
    return wanted


def _by_class(truth: TruthTable, detections: DetectionTable, curves: Curves) -> Iterable[ClassMetrics]:
    objects = np.bincount(truth.object_categories[~truth.crowd], minlength=len(truth.names))
    rows = np.searchsorted(truth.category_ids, detections.category_ids)
    found = np.bincount(rows, minlength=len(truth.names))
    for k, (category_id, name) in enumerate(zip(truth.category_ids.tolist(), truth.names, strict=True)):
        yield ClassMetrics(category_id, name, int(objects[k]), int(found[k]), curves.metrics(k))


def _mean(values: NDArray[np.float64]) -> float:
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _pycocotools(truth: TruthTable, detections: DetectionTable) -> Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints; stdout is ours
        known, found = COCO(), COCO()
        known.dataset = _truth_document(truth)
        found.dataset = {**known.dataset, "annotations": _detection_rows(truth, detections)}
        known.createIndex()
        found.createIndex()
        return _run(COCOeval(known, found, "bbox"))


def _ultrafast(truth: TruthTable, detections: DetectionTable) -> Curves:
    from ultrafast_pycocotools import COCO, COCOeval

    images = np.searchsorted(truth.image_ids, detections.image_ids)
    categories = np.searchsorted(truth.category_ids, detections.category_ids)
    rows = np.column_stack([images, detections.boxes, detections.scores, categories])
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(_truth_document(truth), verbose=False)
        return _run(COCOeval(known, known.loadRes(np.ascontiguousarray(rows, np.float64)), "bbox"))


def _run(evaluator: Any) -> Curves:
    evaluator.evaluate()
    evaluator.accumulate()
    return Curves(evaluator.eval["precision"], evaluator.eval["recall"])


def _truth_document(truth: TruthTable) -> dict[str, Any]:
    """For a scorer: rows as ids, which keeps the order of ids, and annotation ids from 1, since 0 means unmatched to it."""
    columns = (truth.object_images, truth.object_categories, truth.boxes, truth.areas, truth.crowd)
    objects = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for i, (image, category, box, area, crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]
    return {
        "images": [{"id": row} for row in range(len(truth.image_ids))],
        "categories": [{"id": row} for row in range(len(truth.category_ids))],
        "annotations": objects,
    }


def _detection_rows(truth: TruthTable, detections: DetectionTable) -> list[dict[str, Any]]:
    images = np.searchsorted(truth.image_ids, detections.image_ids)
    categories = np.searchsorted(truth.category_ids, detections.category_ids)
    areas = detections.boxes[:, 2] * detections.boxes[:, 3]
    columns = (images, categories, detections.boxes, areas, detections.scores)
    return [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": s}
        for i, (image, category, box, area, s) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]
