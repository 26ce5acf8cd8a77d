"""Dropout whose draws do not cost more than the layer before it.

On the CPU torch draws a number of 53 bits for each element, which takes longer than a linear layer's products. Here sixteen
bits decide (0.1 becomes 0.100006, and the scale goes with it), four elements a draw, and what is kept for backward is two
bytes an element.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 2**16


class Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * _LEVELS)
        quick = input.is_cpu and input.dtype in (torch.float32, torch.bfloat16) and 0 < dropped < _LEVELS
        if not self.training or not quick or torch.compiler.is_compiling():
            return super().forward(input)
        out: Tensor = _Drop.apply(input, dropped)
        return out


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        keep = _draw(x, dropped)
        ctx.save_for_backward(keep)
        ctx.scale = _LEVELS / (_LEVELS - dropped)
        return _keep(x, keep, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _keep(gradient, keep, ctx.scale), None


def _draw(x: Tensor, dropped: int) -> Tensor:
    """One int16 an element: all bits set where it is kept. 64 bits are drawn at once, by torch's generator."""
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[: x.numel()].ge_(dropped - _LEVELS // 2).neg_().view(x.shape)


def _keep(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """scale * x where kept, 0 elsewhere; bfloat16 on its bits, because its products take torch longer than those of float32."""
    if x.dtype == torch.bfloat16:
        return (x.contiguous().view(torch.int16) & keep).view(torch.bfloat16).mul_(scale)
    return keep.to(x.dtype).mul_(-scale).mul_(x)
