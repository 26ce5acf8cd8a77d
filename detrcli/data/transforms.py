"""From a uint8 picture and its objects to a `Sample`: DETR's recipes, on tensors, with explicit randomness.

    evaluation(preprocess)       resize, normalise
    training(kind, preprocess)   "detr" flip, multi-scale resize, crop · "flip" flip, resize · "none" resize

A transform draws only from the generator it is given, so a sample depends on (seed, epoch, index) and on nothing else.
Sizes scale with the recipe: at `short_side` 800 they are DETR's own (480..800; crops of 384..600 from 400..600).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detrcli import ops
from detrcli.data.annotations import Array, Objects
from detrcli.errors import UsageError
from detrcli.plugins.contract import Preprocess
from detrcli.types import Target

Kind: TypeAlias = Literal["detr", "flip", "none"]
Size: TypeAlias = tuple[int, int]  # height, width

_FULL = 800  # the short side that the numbers below belong to
_SCALES = tuple(range(480, 801, 32))
_BEFORE_CROP = (400, 500, 600)
_CROP = (384, 600)


@dataclass(slots=True)
class View:
    """A picture on its way: pixels and the trainable objects in them."""

    pixels: Tensor  # (3, H, W) uint8
    boxes: Array  # (T, 4) float64, xyxy in pixels
    labels: Array  # (T,) int64
    masks: Tensor | None = None  # (T, H, W) uint8, where a paper needs them

    @property
    def size(self) -> Size:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def keep(self, chosen: Array) -> None:
        self.boxes, self.labels = self.boxes[chosen], self.labels[chosen]
        if self.masks is not None:
            self.masks = self.masks[torch.from_numpy(chosen)]


Step: TypeAlias = Callable[[View, np.random.Generator], None]


def view_of(pixels: Tensor, objects: Objects, masks: Tensor | None = None) -> View:
    """The objects that can be learned from: no crowds, clipped to the picture, nothing without area."""
    corners = objects.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    view = View(pixels, corners, objects.labels, masks)
    view.keep(objects.trainable)
    _clip(view)
    return view


def resized(size: Size, short_side: int, long_side: int | None = None) -> Size:
    """The size after scaling the short side to `short_side`, the long side capped; fractions are cut off, as DETR does."""
    short, long = min(size), max(size)
    if long_side is not None and long / short * short_side > long_side:
        short_side = max(1, round(long_side * short / long))
    if short == short_side:
        return size
    other = int(short_side * long / short)
    return (short_side, other) if size[0] < size[1] else (other, short_side)


def resize(view: View, size: Size) -> None:
    """Scale pixels (bilinear, antialiased) and boxes; in place of the view."""
    if size == view.size:
        return
    (old_h, old_w), (new_h, new_w) = view.size, size
    view.pixels = scale_pixels(view.pixels, size)
    view.boxes = view.boxes * (new_w / old_w, new_h / old_h, new_w / old_w, new_h / old_h)
    if view.masks is not None:
        rows, columns = (torch.arange(n) * old // n for n, old in zip(size, (old_h, old_w), strict=True))
        view.masks = view.masks[:, rows][:, :, columns]  # the nearest; interpolate refuses zero masks


def scale_pixels(pixels: Tensor, size: Size) -> Tensor:
    """(3, H, W) uint8 at another size; the interleaved bytes of a decoder are scaled as they lie, which is twice as fast."""
    _, height, width = pixels.shape
    interleaved = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    batch = interleaved.as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3))
    return interpolate(batch, size, mode="bilinear", antialias=True)[0]


def normalise(pixels: Tensor, preprocess: Preprocess, out: Tensor | None = None) -> Tensor:
    """(3, H, W) uint8 as float with the statistics' mean and deviation taken out. `out`: where to, zero beyond the picture.

    The bytes of a decoder lie interleaved (channels last), and so does the result: then both are plain rows of numbers.
    """
    _, height, width = pixels.shape
    image = torch.empty(height, width, 3).permute(2, 0, 1) if out is None else out
    rows, values = image.permute(1, 2, 0).flatten(1), pixels.permute(1, 2, 0).flatten(1)  # (H, 3 W)
    ops.normalise(values, *_statistics(preprocess, width), rows)
    return image


@functools.lru_cache(maxsize=256)
def _statistics(preprocess: Preprocess, width: int) -> tuple[Tensor, Tensor]:
    """Factor and summand for each number of a row (3 W)."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)


def prepare(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """A picture (3, H, W) uint8 as a model wants it: evaluation's resize and normalisation."""
    size = resized((pixels.shape[1], pixels.shape[2]), preprocess.short_side, preprocess.long_side)
    if size != tuple(pixels.shape[1:]):
        pixels = scale_pixels(pixels, size)
    return normalise(pixels, preprocess)


@dataclass(frozen=True, slots=True)
class Transform:
    """Steps on the uint8 picture, and the statistics to normalise it with afterwards. Survives pickling."""

    steps: tuple[Step, ...]
    preprocess: Preprocess

    def __call__(self, view: View, rng: np.random.Generator) -> View:
        for step in self.steps:
            step(view, rng)
        return view


def evaluation(preprocess: Preprocess) -> Transform:
    return Transform((ToScale((preprocess.short_side,), preprocess.long_side),), preprocess)


def training(kind: Kind, preprocess: Preprocess) -> Transform:
    if kind == "none":
        return evaluation(preprocess)
    whole = ToScale((preprocess.short_side,), preprocess.long_side)
    if kind == "flip":
        return Transform((Flip(), whole), preprocess)
    if kind != "detr":
        raise UsageError(f"unknown augmentation {kind!r}", hint="known: detr, flip, none")

    def scaled(side: int) -> int:
        return max(1, round(side * preprocess.short_side / _FULL))

    scales = ToScale(tuple(map(scaled, _SCALES)), preprocess.long_side)
    crop = Crop(scaled(_CROP[0]), scaled(_CROP[1]))
    cropped = (ToScale(tuple(map(scaled, _BEFORE_CROP)), None), crop, scales)
    return Transform((Flip(), Either((scales,), cropped)), preprocess)


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirror left and right, half of the time."""

    def __call__(self, view: View, rng: np.random.Generator) -> None:
        if rng.random() >= 0.5:
            return
        view.pixels = view.pixels.flip(-1)
        width = view.size[1]
        view.boxes = view.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
        if view.masks is not None:
            view.masks = view.masks.flip(-1)


@dataclass(frozen=True, slots=True)
class ToScale:
    """Resize the short side to one of `sides`, the long side capped."""

    sides: tuple[int, ...]
    long_side: int | None

    def __call__(self, view: View, rng: np.random.Generator) -> None:
        side = self.sides[int(rng.integers(len(self.sides)))] if len(self.sides) > 1 else self.sides[0]
        resize(view, resized(view.size, side, self.long_side))


@dataclass(frozen=True, slots=True)
class Crop:
    """Cut out a rectangle, each side drawn from low..high but never above the picture's; keeps what is still visible."""

    low: int
    high: int

    def __call__(self, view: View, rng: np.random.Generator) -> None:
        height, width = (
            int(rng.integers(min(self.low, side), min(self.high, side) + 1)) for side in view.size
        )
        top = int(rng.integers(view.size[0] - height + 1))
        left = int(rng.integers(view.size[1] - width + 1))
        view.pixels = view.pixels[:, top : top + height, left : left + width]
        if view.masks is not None:
            view.masks = view.masks[:, top : top + height, left : left + width]
        view.boxes = view.boxes - (left, top, left, top)
        _clip(view)


@dataclass(frozen=True, slots=True)
class Either:
    """One of two ways, with equal chances."""

    first: tuple[Step, ...]
    second: tuple[Step, ...]

    def __call__(self, view: View, rng: np.random.Generator) -> None:
        for step in self.first if rng.random() < 0.5 else self.second:
            step(view, rng)


def _clip(view: View) -> None:
    height, width = view.size
    view.boxes = np.clip(view.boxes, 0, (width, height, width, height))
    view.keep((view.boxes[:, 2] > view.boxes[:, 0]) & (view.boxes[:, 3] > view.boxes[:, 1]))


def target_of(view: View) -> Target:
    """The objects as a criterion wants them: cxcywh, normalised to the picture."""
    height, width = view.size
    x1, y1, x2, y2 = view.boxes.T / np.array([[width], [height], [width], [height]])
    boxes: npt.NDArray[np.float32] = np.stack(
        [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1
    ).astype(np.float32)
    extras = {} if view.masks is None else {"masks": view.masks.bool()}
    return Target(torch.from_numpy(view.labels.copy()), torch.from_numpy(boxes), extras)
