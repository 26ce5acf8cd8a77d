"""Instance masks from COCO outlines (polygons, RLE), for the papers that train on them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrcli.data.annotations import Annotations, Objects


def masks_of(annotations: Annotations, objects: Objects, size: tuple[int, int]) -> Tensor | None:
    """(T, H, W) uint8, or None where the data set was loaded without outlines."""
    if annotations.segments is None:
        return None
    outlines = [json.loads(text) for text in annotations.segments[objects.rows]]
    drawn = [draw(o, b, size) for o, b in zip(outlines, objects.boxes, strict=True)]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *size, dtype=torch.uint8)


def draw(outline: Any, box: Any, size: tuple[int, int]) -> Any:
    """One mask (H, W) uint8; an object without an outline is its box."""
    from pycocotools import mask as rle

    if not outline:
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if isinstance(outline, list):
        coded = rle.merge(rle.frPyObjects(outline, *size))
    else:
        coded = outline if isinstance(outline["counts"], (str, bytes)) else rle.frPyObjects(outline, *size)
    return rle.decode(coded)
