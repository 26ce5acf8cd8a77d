"""RoIAlign over a pyramid in one call: the levels lie on one canvas, and each box is pooled where its own level lies.

Torchvision's multi-level pooling loops over levels with a data-dependent number of boxes each, and pools unaligned. Here
shapes depend on nothing but the maps' sizes: no synchronisation with the host, and one RoiAlign in an exported graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detrcli.boxes import cxcywh_to_xyxy
from detrcli_dynamic_detr.config import Operators
from detrcli_dynamic_detr.operators import roi_align


@dataclass(frozen=True, slots=True)
class Canvas:
    """The levels of a pyramid, one under another, each with a border that repeats its edge (as RoIAlign would)."""

    map: Tensor  # (B, C, sum of the levels' heights + 2, width of the finest + 2)
    top: Tensor  # (L,) row of each level's first pixel; its first column is 1


def draw(maps: Sequence[Tensor]) -> Canvas:
    """`maps` (B, C, H, W), finest and so widest first."""
    bordered = [F.pad(x, (1, 1, 1, 1), mode="replicate") for x in maps]
    width = bordered[0].shape[-1]
    canvas = torch.cat([F.pad(x, (0, width - x.shape[-1])) for x in bordered], 2)
    heights = torch.tensor([0, *(x.shape[-2] for x in bordered[:-1])]).to(canvas.device, non_blocking=True)
    return Canvas(canvas, heights.cumsum(0) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """Features of boxes, from the level that suits each box's size."""

    levels: tuple[int, ...]  # level l has stride 2**l
    size: int
    samples: int
    canonical_size: float
    canonical_level: int
    form: Operators = "auto"

    def __call__(self, canvas: Canvas, boxes: Tensor, sizes: Tensor) -> Tensor:
        """boxes (B, Q, 4) cxcywh, normalised to pictures of `sizes` (B, 2) height, width -> (B, Q, size * size, C).

        Whatever the boxes are, they are pooled inside their pictures. No gradient goes to them.
        """
        boxes = in_pixels(boxes.detach(), sizes)
        level = self.level_of(boxes)
        top = canvas.top[level].to(boxes.dtype)
        first = torch.stack((torch.ones_like(top), top), -1)  # x and y of the level's first pixel
        boxes = boxes * 2.0 ** -(level + self.levels[0])[..., None] + first.repeat(1, 1, 2)
        return roi_align(canvas.map, boxes, size=self.size, samples=self.samples, form=self.form)

    def level_of(self, boxes: Tensor) -> Tensor:
        """The index of the level for each box (..., 4), xyxy in pixels."""
        side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()
        level = (self.canonical_level + torch.log2(side / self.canonical_size + 1e-8)).floor()
        return level.clamp(self.levels[0], self.levels[-1]).long() - self.levels[0]


def in_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Normalised cxcywh as xyxy in pixels, clamped to the picture; a box that is not a number becomes an empty one."""
    corners = cxcywh_to_xyxy(boxes).nan_to_num(0.0).clamp(0, 1)
    low, high = corners[..., :2], torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat((low, high), -1) * sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
