"""The twelve COCO numbers, over all classes and for each.

pycocotools is the reference; ultrafast-pycocotools (extra `eval`) gives the same curves bit by bit in a hundredth of the time
and is used when it is installed. Both answer precision and recall curves; the means are taken here, in one place.

A number is -1 where nothing could be measured (no large object in the data, say), as pycocotools has it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
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

    def metrics(self) -> dict[str, float]:
        """The twelve numbers over all classes."""
        return {name: _mean(values) for name, values in self._averaged()}

    def by_class(self) -> list[dict[str, float]]:
        """The twelve numbers of each class row."""
        columns = {name: _means(values.reshape(-1, values.shape[-1])) for name, values in self._averaged()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _averaged(self) -> Iterator[tuple[str, Floats]]:
        """What each number is the mean of: (T, R, K) or (T, K)."""
        for name, (iou, area) in PRECISIONS.items():
            yield name, self.precision[IOU_THRESHOLDS[iou], :, :, AREAS[area], MAX_DETECTIONS[100]]
        for name, (area, count) in RECALLS.items():
            yield name, self.recall[:, :, AREAS[area], MAX_DETECTIONS[count]]


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
    notes: tuple[str, ...] = ()  # what looked suspicious, or changes what the numbers mean, in words


def score(
    truth: TruthTable,
    detections: DetectionTable,
    *,
    backend: Backend = "auto",
    where: str = "detections",
    notes: Sequence[str] = (),
) -> CocoMetrics:
    """Score detections; what cannot be scored is a DataError, never a wrong number. `notes` are those that come first."""
    found = detections.check_against(truth, where)
    chosen = choose_backend(backend)
    curves = (_ultrafast if chosen == "ultrafast" else _pycocotools)(truth, found)
    notes = (*notes, *found.suspicions(truth, where))
    return CocoMetrics(curves.metrics(), tuple(_by_class(truth, found, curves)), chosen, notes)


def choose_backend(wanted: Backend = "auto") -> Literal["pycocotools", "ultrafast"]:
    """The scorer to use: the fast one when it is installed."""
    installed = importlib.util.find_spec("ultrafast_pycocotools") is not None
    if wanted == "ultrafast" and not installed:
        raise UsageError(
            "the ultrafast scorer is not installed",
            hint="pip install 'detrcli[eval]', or --scorer pycocotools",
        )
    if wanted == "auto":
        return "ultrafast" if installed else "pycocotools"
    return wanted


def _by_class(truth: TruthTable, found: DetectionTable, curves: Curves) -> Iterable[ClassMetrics]:
    objects = np.bincount(truth.object_categories[~truth.crowd], minlength=len(truth.names))
    counts = np.bincount(found.category_ids, minlength=len(truth.names))
    columns = (truth.category_ids.tolist(), truth.names, objects.tolist(), counts.tolist(), curves.by_class())
    return (ClassMetrics(*row) for row in zip(*columns, strict=True))


def _mean(values: NDArray[np.float64]) -> float:
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _means(values: Floats) -> list[float]:
    """`_mean` of each column."""
    measured = values > -1
    counts = measured.sum(0)
    sums = np.where(measured, values, 0).sum(0)
    means: list[float] = np.where(counts > 0, sums / np.maximum(counts, 1), -1).tolist()
    return means


def _pycocotools(truth: TruthTable, found: DetectionTable) -> Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints; stdout is ours
        known, answer = COCO(), COCO()
        known.dataset = _truth_document(truth)
        answer.dataset = {**known.dataset, "annotations": _detection_rows(found)}
        known.createIndex()
        answer.createIndex()
        return _run(COCOeval(known, answer, "bbox"))


def _ultrafast(truth: TruthTable, found: DetectionTable) -> Curves:
    from ultrafast_pycocotools import COCO, COCOeval

    # Class by class, it walks through memory in order and takes two thirds of the time; ties keep their order in an image.
    order = np.argsort(found.category_ids.astype(np.min_scalar_type(len(truth.names))), kind="stable")
    columns = (found.image_ids, found.boxes, found.scores, found.category_ids)
    rows = np.column_stack(columns).take(order, axis=0)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(_truth_document(truth), verbose=False)
        return _run(COCOeval(known, known.loadRes(rows), "bbox"))


def _run(evaluator: Any) -> Curves:
    evaluator.evaluate()
    evaluator.accumulate()
    return Curves(evaluator.eval["precision"], evaluator.eval["recall"])


def _truth_document(truth: TruthTable) -> dict[str, Any]:
    """For a scorer: rows as ids, which keeps the order of ids, and annotation ids from 1, since 0 means unmatched to it."""
    crowd = truth.crowd.astype(np.int64)
    columns = (truth.object_images, truth.object_categories, truth.boxes, truth.areas, crowd)
    objects = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": is_crowd,
        }
        for i, (image, category, box, area, is_crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]
    return {
        "images": [{"id": row} for row in range(len(truth.image_ids))],
        "categories": [{"id": row} for row in range(len(truth.category_ids))],
        "annotations": objects,
    }


def _detection_rows(found: DetectionTable) -> list[dict[str, Any]]:
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    columns = (found.image_ids, found.category_ids, found.boxes, areas, found.scores)
    return [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": s}
        for i, (image, category, box, area, s) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]
