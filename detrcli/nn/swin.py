"""timm's Swin transformers as detectors train them: pictures of any size, and a norm behind each map that is used."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn


class SwinBody(nn.Module):
    """images (B, 3, H, W) -> normed maps (B, H, W, C)."""

    output_fmt = "NHWC"

    def __init__(self, maps: Any) -> None:
        super().__init__()
        self.maps = maps
        self.feature_info = maps.feature_info
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in maps.feature_info.channels())
        for module in maps.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PaddedBlock

    def forward(self, images: Tensor) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.norms, self.maps(images), strict=True)]


class PaddedBlock(SwinTransformerBlock):
    """Pads a map to whole windows before it shifts them; timm pads after, which is another function where it pads at all."""

    def _attn(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        down, right = (-size % window for size, window in zip((height, width), self.window_size, strict=True))
        attended: Tensor = super()._attn(F.pad(x, (0, 0, 0, right, 0, down)))  # type: ignore[no-untyped-call]
        return attended[:, :height, :width]
