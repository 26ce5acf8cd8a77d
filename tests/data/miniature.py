"""A miniature of COCO's folder layout with everything that real data does: gaps in ids, a crowd, an image without objects,
grey, EXIF-rotated and PNG pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 90, "name": "tooth brush"}]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


def coco_document() -> dict:
    images = [
        {"id": 42, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 7, "file_name": "grey.jpg", "width": 40, "height": 60},
        {"id": 100, "file_name": "turned.jpg", "width": 30, "height": 50},
        {"id": 9, "file_name": "empty.png", "width": 32, "height": 32},
    ]
    boxes = [
        (1, 42, 3, [4, 5, 20, 10], 0),
        (2, 42, 90, [30, 8, 30.5, 38.25], 0),
        (5, 7, 17, [0, 0, 40, 60], 0),
        (6, 7, 3, [5, 5, 30, 30], 1),
        (9, 100, 17, [2, 30, 10, 15], 0),
    ]
    annotations = [
        {"id": i, "image_id": m, "category_id": c, "bbox": b, "area": b[2] * b[3] * 0.8, "iscrowd": crowd}
        for i, m, c, b, crowd in boxes
    ]
    return {"images": images, "annotations": annotations, "categories": [dict(row) for row in CATEGORIES]}


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture(64, 48, 1).save(folder / "a.jpg")
    picture(40, 60, 2).convert("L").save(folder / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(50, 30, 3).save(folder / "turned.jpg", exif=exif)  # shown as 30 x 50
    picture(32, 32, 4).save(folder / "empty.png")


def write_coco(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        write_pictures(root / split)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco_document()))
    return root
