"""Instance masks from COCO outlines (polygons, RLE), for the papers that train on them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detrcli.data.annotations import Annotations, Objects
from detrcli.errors import DataError

Size = tuple[int, int]  # height, width


def masks_of(annotations: Annotations, objects: Objects, size: Size) -> Tensor | None:
    """(T, H, W) uint8, or None where the data set was loaded without outlines."""
    if annotations.segments is None:
        return None
    masks = np.zeros((len(objects.boxes), *size), np.uint8)
    for mask, row, box in zip(
        masks, range(objects.rows.start, objects.rows.stop), objects.boxes, strict=True
    ):
        drawn = draw(json.loads(annotations.segments[row]), box, size)
        if drawn is None:
            name = annotations.names[int(np.searchsorted(annotations.offsets, row, side="right")) - 1]
            raise DataError(
                f"{name} annotation {annotations.ids[row]}: its segmentation does not decode for a picture of {size[1]}x{size[0]}",
                hint="mend it, or remove it: then the box stands for the mask",
            )
        mask[...] = drawn
    return torch.from_numpy(masks)


def without_outline(annotations: Annotations) -> int:
    """How many objects have none (null or an empty list), so that their boxes stand for them."""
    if annotations.segments is None:
        return len(annotations.ids)
    return int((np.diff(annotations.segments.ends, prepend=0) <= len("null")).sum())


def undecodable(annotations: Annotations) -> npt.NDArray[Any]:
    """The objects whose outlines mean nothing, so that none could be drawn."""
    sizes = np.repeat(annotations.sizes, np.diff(annotations.offsets), axis=0)
    texts = enumerate(annotations.segments or ())
    found = [row for row, text in texts if not _decodes(json.loads(text), sizes[row].tolist())]
    return np.array(found, np.int64)


def _decodes(outline: Any, size: list[int]) -> bool:
    """Runs are for one size of picture: where it is not known, nothing can be said of them."""
    if not outline or (isinstance(outline, dict) and 0 in size):
        return True
    return _are_polygons(outline) or _runs(outline, (size[0], size[1])) is not None


def draw(outline: Any, box: Sequence[float] | npt.NDArray[Any], size: Size) -> npt.NDArray[np.uint8] | None:
    """One mask (H, W) of polygons or RLE; without an outline, of the box; None for an outline that means nothing."""
    if not outline:
        x, y, w, h = map(float, box)
        return _fill([[x, y, x + w, y, x + w, y + h, x, y + h]], size)
    runs = _runs(outline, size)
    if runs is not None:
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.asarray(flat.reshape(size, order="F"), np.uint8)
    if _are_polygons(outline):
        return _fill(outline, size)
    return None


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


def _are_polygons(outline: Any) -> bool:
    return isinstance(outline, list) and all(_is_polygon(points) for points in outline)


def _is_polygon(points: Any) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6 for v in points)
