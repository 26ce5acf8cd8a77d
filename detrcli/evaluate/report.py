"""What an evaluation leaves behind: numbers as JSON and CSV, detections in COCO results form."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrcli.evaluate.coco import METRICS, CocoMetrics
from detrcli.evaluate.tables import DetectionTable
from detrcli.files import writing

METRICS_FILE, CLASSES_FILE, DETECTIONS_FILE = "metrics.json", "classes.csv", "detections.json"


def document(coco: CocoMetrics, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, as plain values; -1 where nothing could be measured."""
    classes = [
        {"id": c.category_id, "name": c.name, "objects": c.objects, "detections": c.detections} | c.metrics
        for c in coco.classes
    ]
    return {
        **about,
        "scorer": coco.backend,
        "metrics": coco.metrics,
        "classes": classes,
        "notes": list(coco.notes),
    }


def write(folder: Path, coco: CocoMetrics, detections: DetectionTable, about: Mapping[str, Any]) -> None:
    """metrics.json, classes.csv and detections.json, the last to be scored again by `detr eval DATA --detections`."""
    text = json.dumps({"schema_version": 1, **document(coco, about)}, ensure_ascii=False, indent=1)
    with writing(f"in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        detections.write(folder / DETECTIONS_FILE)
        (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
        _write_classes(folder / CLASSES_FILE, coco)


def _write_classes(path: Path, coco: CocoMetrics) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("id", "name", "objects", "detections", *METRICS))
        for c in coco.classes:
            table.writerow((c.category_id, c.name, c.objects, c.detections, *c.metrics.values()))
