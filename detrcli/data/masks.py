"""Instance masks from COCO outlines (polygons, RLE), for the papers that train on them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrcli.data.annotations import Annotations, Array, Objects
from detrcli.errors import DataError


def masks_of(annotations: Annotations, objects: Objects, size: tuple[int, int]) -> Tensor | None:
    """(T, H, W) uint8, or None where the data set was loaded without outlines."""
    if annotations.segments is None:
        return None
    rows = range(objects.rows.start, objects.rows.stop)
    drawn = [_mask(annotations, row, size) for row in rows]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *size, dtype=torch.uint8)


def without_outline(annotations: Annotations) -> int:
    """How many objects have none (null or an empty list), so that their boxes stand for them."""
    if annotations.segments is None:
        return len(annotations.ids)
    return int((np.diff(annotations.segments.ends, prepend=0) <= len("null")).sum())


def _mask(annotations: Annotations, row: int, size: tuple[int, int]) -> Array:
    assert annotations.segments is not None
    try:
        mask = draw(json.loads(annotations.segments[row]), annotations.boxes[row], size)
        if mask.shape != size:
            raise ValueError(
                f"it is for a picture of {mask.shape[1]}x{mask.shape[0]}, not {size[1]}x{size[0]}"
            )
    except Exception as error:  # pycocotools raises whatever it meets, bare Exception included
        raise DataError(
            f"annotation {annotations.ids[row]}: its segmentation does not decode: {error or type(error).__name__}",
            hint="mend it, or remove it: then the box stands for the mask",
        ) from None
    return mask


def draw(outline: Any, box: Any, size: tuple[int, int]) -> Array:
    """One mask (H, W) uint8 of polygons or RLE, compressed or not; an object without an outline is its box."""
    from pycocotools import mask as rle

    if not outline:
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if isinstance(outline, list):
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in outline):
            raise ValueError("a polygon needs three points or more, x and y of each")
        coded = rle.merge(rle.frPyObjects(outline, *size))
    else:
        coded = outline if isinstance(outline["counts"], (str, bytes)) else rle.frPyObjects(outline, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools hands numpy its arrays in the old way
        return np.asarray(rle.decode(coded))
