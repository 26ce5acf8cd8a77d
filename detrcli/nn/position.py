"""Sine encodings of places: of every pixel of a padded map, and of boxes.

DETR (eq. in its appendix A.4) and Deformable DETR differ by half a pixel: the first normalises y / y_last, the second
(y - 0.5) / y_last. `offset` chooses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0


def sine_positions(
    mask: Tensor,
    channels: int,
    *,
    offset: float = 0.0,
    eps: float = 1e-6,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Encodings of the unpadded pixels of `mask` (B, H, W; True on padding), as (B, channels, H, W): y first, then x.

    Coordinates count unpadded pixels (1, 2, …), are divided by the last one, and scaled to 2π; on padding they stay at the last.
    """
    valid = (~mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + eps) * 2 * math.pi
    x = (x + offset) / (x[:, :, -1:] + eps) * 2 * math.pi
    return torch.cat([sine(place, channels // 2, temperature) for place in (y, x)], -1).permute(0, 3, 1, 2)


def sine_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Encodings of boxes in [0, 1]: each coordinate on its own, in the order given; (..., 4) -> (..., 4 * channels)."""
    return sine(boxes * 2 * math.pi, channels).flatten(-2)


def sine(x: Tensor, channels: int, temperature: float = TEMPERATURE) -> Tensor:
    """sin and cos, interleaved, of x over geometrically falling frequencies; (...) -> (..., channels)."""
    frequency = torch.arange(channels // 2, dtype=torch.float32, device=x.device) * (2 / channels)
    angle = x[..., None] / temperature**frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
