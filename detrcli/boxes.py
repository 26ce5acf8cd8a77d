"""Box formats and overlaps. Every function takes (..., 4) tensors and keeps the leading axes.

cxcywh   centre and size, normalised to [0, 1]: models, targets, losses
xyxy     corners: after `postprocess`, in pixels
xywh     corner and size in pixels: COCO JSON
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((0.5 * (low + high), high - low), -1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), -1)


def area(boxes: Tensor) -> Tensor:
    """Areas of xyxy boxes; negative sides count as they are, so that gradients never vanish in a clamp."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of xyxy boxes, with the union; the leading axes broadcast.

    `iou(a[:, None], b[None])` gives all pairs. Two empty boxes overlap by 0, never by NaN.
    """
    left, top = torch.maximum(a[..., 0], b[..., 0]), torch.maximum(a[..., 1], b[..., 1])
    right, bottom = torch.minimum(a[..., 2], b[..., 2]), torch.minimum(a[..., 3], b[..., 3])
    shared = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    union = area(a) + area(b) - shared
    return shared / _away_from_zero(union), union


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of xyxy boxes in [-1, 1]; the leading axes broadcast. Degenerate boxes give a number, not an assertion."""
    overlap, union = iou(a, b)
    width = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    height = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    hull = width.clamp(min=0) * height.clamp(min=0)
    return overlap - (hull - union) / _away_from_zero(hull)


def _away_from_zero(x: Tensor) -> Tensor:
    """The divisor, or 1 where it is 0 (the dividend is 0 there too)."""
    return torch.where(x == 0, 1, x)
