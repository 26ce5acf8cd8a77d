"""Instance masks from COCO outlines (polygons, RLE), for the papers that train on them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detrcli.data.annotations import Annotations, Objects

Size = tuple[int, int]  # height, width


def masks_of(annotations: Annotations, objects: Objects, size: Size) -> Tensor | None:
    """(T, H, W) uint8, or None where the data set was loaded without outlines."""
    if annotations.segments is None:
        return None
    outlines = [json.loads(text) for text in annotations.segments[objects.rows]]
    masks = np.zeros((len(outlines), *size), np.uint8)
    for mask, outline, box in zip(masks, outlines, objects.boxes, strict=True):
        mask[...] = draw(outline, box, size)
    return torch.from_numpy(masks)


def draw(outline: Any, box: npt.NDArray[Any], size: Size) -> npt.NDArray[np.uint8]:
    """One mask (H, W). An object without an outline that can be drawn is its box."""
    runs = _runs(outline, size)
    if runs is not None:
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.asarray(flat.reshape(size, order="F"), np.uint8)
    polygons = [p for p in outline if _is_polygon(p)] if isinstance(outline, list) else []
    if not polygons:
        x, y, w, h = box
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return _fill(polygons, size)


def _fill(polygons: list[list[float]], size: Size) -> npt.NDArray[np.uint8]:
    """COCO's own rule of which pixels a polygon covers."""
    from pycocotools import mask as rle

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of numpy, about how pycocotools hands out its memory
        return np.asarray(rle.decode(rle.merge(rle.frPyObjects(polygons, *size))), np.uint8)


def _runs(outline: Any, size: Size) -> list[int] | None:
    """The run lengths of an RLE, compressed or not, where they fill the picture; others would be read past its end."""
    if not isinstance(outline, dict) or outline.get("size") != list(size):
        return None
    counts = outline.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return None
    return counts if sum(counts) == size[0] * size[1] else None


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed counts: five bits a letter, the lowest first, bit 6 says that more follow; from the fourth
    count on, the difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _is_polygon(points: Any) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6 for v in points)
