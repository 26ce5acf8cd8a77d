"""Large pictures in overlapping tiles: where the tiles lie, and how their answers become one.

A detection transformer gives one box an object and needs no suppression within a view. Two views of the same place do repeat
each other, so boxes compete only across views: one that its tile has cut yields to any that holds most of it, and of two
whole ones the surer stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detrcli.boxes import area
from detrcli.types import Detections

OVERLAP = 0.25  # of a tile; objects up to this share of it are whole in one of the tiles
SAME = 0.5  # IoU from which two whole boxes are one object
WITHIN = 0.7  # share of a cut box from which another box holds it
EDGE = 2.0  # pixels from the edge of a tile at which a box counts as cut


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a picture, in pixels."""

    x: int
    y: int
    width: int
    height: int


def windows(height: int, width: int, tile: int | None) -> list[Window]:
    """The whole picture, and the tiles that cover it where it is larger than one."""
    whole = Window(0, 0, width, height)
    if tile is None or (height <= tile and width <= tile):
        return [whole]
    tiles = [
        Window(x, y, min(tile, width), min(tile, height))
        for y in _starts(height, tile)
        for x in _starts(width, tile)
    ]
    return [whole, *tiles]


def _starts(length: int, tile: int) -> list[int]:
    """Evenly spread, at least OVERLAP of a tile shared between neighbours."""
    if length <= tile:
        return [0]
    steps = -int(-(length - tile) // (tile * (1 - OVERLAP)))
    return [round(i * (length - tile) / steps) for i in range(steps + 1)]


def merge(answers: Sequence[Detections], places: Sequence[Window], height: int, width: int) -> Detections:
    """The answers of all views of one picture in its own pixels, each object once, best first."""
    if len(answers) == 1:
        return answers[0]
    boxes = torch.cat(
        [a.boxes + a.boxes.new_tensor([p.x, p.y, p.x, p.y]) for a, p in zip(answers, places, strict=True)]
    )
    scores = torch.cat([a.scores for a in answers])
    labels = torch.cat([a.labels for a in answers])
    view = torch.cat([torch.full_like(a.labels, i) for i, a in enumerate(answers)])
    cut = torch.cat([_cut(a.boxes, p, height, width) for a, p in zip(answers, places, strict=True)])
    order = scores.argsort(descending=True, stable=True)
    order = order[cut[order].to(torch.uint8).argsort(stable=True)]  # whole boxes first
    kept = _compete(boxes[order], labels[order], view[order], cut[order])
    rows = order[kept]
    rows = rows[scores[rows].argsort(descending=True, stable=True)]
    return Detections(scores[rows], labels[rows], boxes[rows])


def _cut(boxes: Tensor, place: Window, height: int, width: int) -> Tensor:
    """Which boxes (N, 4), in pixels of the tile, end at an edge that is not the picture's."""
    x1, y1, x2, y2 = boxes.unbind(1)
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    if place.x > 0:
        cut |= x1 <= EDGE
    if place.y > 0:
        cut |= y1 <= EDGE
    if place.x + place.width < width:
        cut |= x2 >= place.width - EDGE
    if place.y + place.height < height:
        cut |= y2 >= place.height - EDGE
    return cut


def _compete(boxes: Tensor, labels: Tensor, view: Tensor, cut: Tensor) -> Tensor:
    """Rows that stay, going down the order: each removes later rows of its class from other views that repeat it."""
    alive = torch.ones(len(boxes), dtype=torch.bool)
    areas = area(boxes)
    for row in range(len(boxes)):
        if not alive[row]:
            continue
        low = torch.maximum(boxes[row, :2], boxes[row + 1 :, :2])
        high = torch.minimum(boxes[row, 2:], boxes[row + 1 :, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        later = areas[row + 1 :]
        repeats = shared > SAME * (areas[row] + later - shared)
        repeats |= cut[row + 1 :] & (shared > WITHIN * later)
        rival = (labels[row + 1 :] == labels[row]) & (view[row + 1 :] != view[row])
        alive[row + 1 :] &= ~(repeats & rival)
    return alive.nonzero()[:, 0]
