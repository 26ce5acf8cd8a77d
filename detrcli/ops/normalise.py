"""Bytes of pictures as the numbers that a model takes, padded: one pass of the native wheel, or blocks in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from detrcli.ops.dispatch import Mode, backend

_BLOCK = 40  # rows at a time: half a megabyte of floats, less than any second cache


def normalise(rows: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, form: Mode | None = None) -> None:
    """out (R, M) float32 = rows (H, N) uint8 * scale (N) + shift (N), zero on the right and below. On the CPU."""
    if backend(rows.device, form).name == "native":
        torch.ops.detrcli_ops.normalise(rows, scale, shift, out)
        return
    height, width = rows.shape
    out[height:] = 0
    out[:height, width:] = 0
    for top in range(0, height, _BLOCK):
        block = out[top : min(top + _BLOCK, height), :width]
        torch.addcmul(shift, block.copy_(rows[top : top + _BLOCK]), scale, out=block)
