"""`shapes`: a synthetic detection data set that costs a millisecond a picture and needs no download.

Picture i of a split depends only on (seed, split, i): coloured, softly varying background with noise, and a few circles,
squares and triangles that hardly overlap. In the easy preset the hue tells the class, so that a small model learns it in
seconds; in the hard one it does not, pictures are larger and objects smaller. Splits never share a picture, because the
split is part of the seed.
"""

from __future__ import annotations

import colorsys
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detrcli.data.annotations import Annotations, Array, Builder, Dataset
from detrcli.data.write import write_coco
from detrcli.errors import UsageError, unknown
from detrcli.types import Categories

CATEGORIES = Categories((1, 2, 3), ("circle", "square", "triangle"))
SPLITS = {"train": 0, "val": 1, "test": 2}
_HUES = (0.0, 0.33, 0.62)  # red, green, blue: one a class in the easy preset
_CONTRAST = 120  # least distance (L1, of 765) between an object and what is behind it
_OVERLAP = 0.1  # of the smaller of two boxes, at most


@dataclass(frozen=True, slots=True)
class Preset:
    size: int
    objects: int  # at most; at least one
    sides: tuple[float, float]  # of the picture
    hue_tells_class: bool
    counts: tuple[tuple[str, int], ...] = (("train", 2000), ("val", 200), ("test", 200))


PRESETS = {
    "easy": Preset(64, 3, (0.2, 0.5), True),
    "hard": Preset(128, 5, (0.12, 0.4), False),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: class, and the square that it fills, in pixels."""

    label: int
    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        return float(self.left), float(self.top), float(self.side), float(self.side)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The pictures of one split; drawn when read."""

    preset: Preset
    split: int
    seed: int

    def read(self, index: int, name: str = "", size: tuple[int, int] = (0, 0)) -> Tensor:
        """(3, H, W) uint8"""
        rng = self._rng(index)
        return torch.from_numpy(_paint(self.preset, _layout(self.preset, rng), rng)).permute(2, 0, 1)

    def file(self, index: int, name: str) -> None:
        """None: there is no file."""

    def stored(self, index: int, name: str) -> None:
        """None: it is drawn."""

    def things(self, index: int) -> list[Thing]:
        return _layout(self.preset, self._rng(index))

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.split, index])


def load_shapes(
    preset: str = "easy",
    split: str = "train",
    *,
    count: int | None = None,
    seed: int = 0,
    masks: bool = False,
) -> Dataset:
    """The data set in memory. `count` pictures, by default the preset's number for the split; `masks` adds outlines."""
    chosen = preset_named(preset)
    if split not in SPLITS:
        raise unknown("split of shapes:", split, SPLITS)
    if count is not None and count < 1:
        raise UsageError(f"a data set needs at least one picture (count given: {count})")
    pictures = Shapes(chosen, SPLITS[split], seed)
    name = "shapes" if preset == "easy" else f"shapes:{preset}"
    annotations = _annotate(pictures, count or dict(chosen.counts)[split], masks)
    return Dataset(name, split, CATEGORIES, annotations, pictures)


def preset_named(name: str) -> Preset:
    if name not in PRESETS:
        raise unknown("preset of shapes:", name, PRESETS)
    return PRESETS[name]


@functools.lru_cache(maxsize=8)
def _annotate(pictures: Shapes, count: int, masks: bool) -> Annotations:
    builder, size = Builder(segments_wanted=masks), pictures.preset.size
    for index in range(count):
        image = builder.image(index + 1, f"{index + 1:06d}.png", size, size)
        for thing in pictures.things(index):
            area = float(_coverage(thing.label, thing.side).sum())
            segment = json.dumps([_outline(thing)]) if masks else "null"
            builder.add(image, len(builder.rows) + 1, thing.label, thing.box, area=area, segment=segment)
    return builder.build()


def _outline(thing: Thing) -> list[float]:
    """The polygon that the shape fills: x, y, x, y, …"""
    corners = _CORNERS[CATEGORIES.names[thing.label]]
    return [
        round(start + thing.side * at, 2)
        for x, y in corners
        for start, at in ((thing.left, x), (thing.top, y))
    ]


_CORNERS = {
    "circle": [
        (0.5 + 0.5 * math.cos(a * math.pi / 16), 0.5 + 0.5 * math.sin(a * math.pi / 16)) for a in range(32)
    ],
    "square": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
}


def write_shapes(
    out: Path, preset: str = "easy", *, train: int | None = None, val: int | None = None, seed: int = 0
) -> dict[str, Dataset]:
    """Write train and val as a COCO folder."""
    counts = {"train": train, "val": val}
    splits = {
        split: load_shapes(preset, split, count=count, seed=seed, masks=True)
        for split, count in counts.items()
    }
    write_coco(splits, out)
    return splits


def _layout(preset: Preset, rng: np.random.Generator) -> list[Thing]:
    """Where the objects stand: up to `objects` squares that hardly overlap."""
    low, high = (max(4, round(s * preset.size)) for s in preset.sides)
    things: list[Thing] = []
    for _ in range(int(rng.integers(1, preset.objects + 1))):
        for label, side, x, y in _tries(rng, low, high):
            left, top = int(x * (preset.size - side + 1)), int(y * (preset.size - side + 1))
            thing = Thing(label, left, top, side)
            if all(_overlap(thing, other) <= _OVERLAP for other in things):
                things.append(thing)
                break
    return sorted(things, key=lambda thing: -thing.side)  # painted in this order: small ones on top


def _tries(rng: np.random.Generator, low: int, high: int) -> Iterator[tuple[int, int, float, float]]:
    """Twenty candidates, drawn at once, so that the stream does not depend on which one is taken."""
    labels = rng.integers(len(CATEGORIES), size=20).tolist()
    sides = rng.integers(low, high + 1, size=20).tolist()
    places = rng.random((20, 2)).tolist()
    for label, side, (x, y) in zip(labels, sides, places, strict=True):
        yield label, side, x, y


def _overlap(a: Thing, b: Thing) -> float:
    """The part of the smaller box that the other covers."""
    width = min(a.left + a.side, b.left + b.side) - max(a.left, b.left)
    height = min(a.top + a.side, b.top + b.side) - max(a.top, b.top)
    return float(max(width, 0) * max(height, 0) / min(a.side, b.side) ** 2)


def _paint(preset: Preset, things: list[Thing], rng: np.random.Generator) -> Array:
    """(H, W, 3) uint8"""
    size = preset.size
    smooth = _spread(size)  # (size, 4)
    corners = rng.uniform(40, 215, (3, 4, 4)).astype(np.float32)
    picture = np.ascontiguousarray((smooth @ corners @ smooth.T).transpose(1, 2, 0))  # (H, W, 3)
    for thing in things:
        patch = picture[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side]
        colour = _colour(preset, thing.label, patch.mean(axis=(0, 1)), rng)
        patch += _coverage(thing.label, thing.side)[:, :, None] * (colour - patch)
    picture += 8 * rng.standard_normal(picture.shape, np.float32)
    return np.asarray(picture.clip(0, 255), np.uint8)


@functools.cache
def _spread(size: int) -> Array:
    """(size, 4): linear interpolation from four knots."""
    place = np.linspace(0, 3, size)[:, None] - np.arange(4)
    return np.asarray(np.maximum(0, 1 - np.abs(place)), np.float32)


def _colour(preset: Preset, label: int, behind: Array, rng: np.random.Generator) -> Array:
    """A colour that stands out from what is behind; the best of ten draws where none does."""
    best, reached = np.zeros(3, np.float32), -1.0
    for a, b, c in rng.random((10, 3)).tolist():
        hue = _HUES[label] + 0.08 * (a - 0.5) if preset.hue_tells_class else a
        rgb = colorsys.hsv_to_rgb(hue % 1, 0.6 + 0.4 * b, 0.4 + 0.6 * c)
        colour = np.array(rgb, np.float32) * 255
        distance = float(np.abs(colour - behind).sum())
        if distance > reached:
            best, reached = colour, distance
        if reached >= _CONTRAST:
            break
    return best


@functools.cache
def _coverage(label: int, side: int) -> Array:
    """(side, side) in 0..1: how much of each pixel the shape covers, from four samples a pixel. It touches all edges."""
    at = (np.arange(2 * side) + 0.5) / (2 * side)
    x, y = at[None, :], at[:, None]
    if CATEGORIES.names[label] == "circle":
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    elif CATEGORIES.names[label] == "square":
        inside = np.ones((2 * side, 2 * side), bool)
    else:
        inside = np.abs(x - 0.5) <= y / 2
    return np.asarray(inside.reshape(side, 2, side, 2).mean(axis=(1, 3)), np.float32)
