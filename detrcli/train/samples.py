"""A few validation pictures with what was annotated (left) and what is found (right): a run's `samples/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detrcli.data.annotations import Dataset
from detrcli.evaluate.tables import DetectionTable
from detrcli.files import replacing
from detrcli.predict.draw import annotate
from detrcli.predict.result import Detection
from detrcli.report.page import SAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

COUNT = 6
SCORE = 0.3  # what is found with less is not drawn
MOST = 50  # boxes on a picture
SIDE = 480  # pixels of the longer side of each half
_GAP = 6


def write(folder: Path, dataset: Dataset, found: DetectionTable, step: int) -> None:
    """Pictures at even distances through the data set, the same ones at every evaluation."""
    (folder / SAMPLES).mkdir(exist_ok=True)
    about = []
    for number, index in enumerate(_chosen(len(dataset)), 1):
        truth = list(_annotated(dataset, index))
        answers = list(_found(dataset, index, found))
        name = f"{number}.jpg"
        with replacing(folder / SAMPLES / name) as temporary:
            _pair(dataset, index, truth, answers).save(temporary, "JPEG", quality=82)
        caption = f"{dataset.annotations.names[index]}: {len(truth)} annotated, {len(answers)} found above {SCORE:g}"
        about.append({"file": name, "caption": caption.encode("utf-8", "replace").decode()})
    with replacing(folder / SAMPLES / f"{SAMPLES}.json") as temporary:
        temporary.write_text(json.dumps({"step": step, "pictures": about}, indent=1) + "\n", encoding="utf-8")


def _chosen(length: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, length - 1, min(COUNT, length))})


def _annotated(dataset: Dataset, index: int) -> Iterator[Detection]:
    objects = dataset.annotations.objects(index)
    for label, box in zip(objects.labels.tolist(), objects.boxes.tolist(), strict=True):
        yield _detection(dataset, label, 1.0, box)


def _found(dataset: Dataset, index: int, found: DetectionTable) -> Iterator[Detection]:
    """The best answers for a picture, best first."""
    here = np.flatnonzero((found.image_ids == dataset.annotations.image_ids[index]) & (found.scores >= SCORE))
    for row in here[np.argsort(-found.scores[here], kind="stable")][:MOST].tolist():
        label = dataset.categories.label_of(int(found.category_ids[row]))
        yield _detection(dataset, label, float(found.scores[row]), found.boxes[row].tolist())


def _detection(dataset: Dataset, label: int, score: float, box: list[float]) -> Detection:
    x, y, width, height = box
    classes = dataset.categories
    return Detection(classes.ids[label], classes.names[label], score, (x, y, x + width, y + height))


def _pair(dataset: Dataset, index: int, truth: list[Detection], found: list[Detection]) -> Image:
    from PIL import Image

    pixels = dataset.picture(index)
    left, right = annotate(pixels, truth[:MOST], scores=False), annotate(pixels, found)
    for half in (left, right):
        half.thumbnail((SIDE, SIDE))
    both = Image.new("RGB", (left.width + _GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    return both
