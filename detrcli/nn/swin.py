"""timm's Swin transformers as detectors train them: pictures of any size, and a norm behind each map that is used."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

PATCH = 4  # pixels a side, of all Swin transformers


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
            elif isinstance(module, PatchMerging):
                module.__class__ = PaddedMerging

    def forward(self, images: Tensor) -> list[Tensor]:
        whole = padded(images.permute(0, 2, 3, 1), (PATCH, PATCH)).permute(0, 3, 1, 2)
        return [norm(x) for norm, x in zip(self.norms, self.maps(whole), strict=True)]


class PaddedBlock(SwinTransformerBlock):
    """Pads a map to whole windows before it shifts them; timm pads after, which is another function where it pads at all.

    Otherwise timm's arithmetic, with all sizes written out: an exporter would have to find those that are left to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out

    def _attn(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        whole = padded(x, self.window_size)
        down, right = self.shift_size
        if down or right:
            whole = torch.roll(whole, (-down, -right), (1, 2))
        attended = self.in_windows(whole)
        if down or right:
            attended = torch.roll(attended, (down, right), (1, 2))
        return attended[:, : x.shape[1], : x.shape[2]]

    def in_windows(self, x: Tensor) -> Tensor:
        """Each window of x (B, H, W, C), of whole windows, attends to itself."""
        batch, height, width, channels = x.shape
        heads, (down, across) = self.attn.num_heads, self.window_size
        qkv = self.attn.qkv(x).view(
            batch, height // down, down, width // across, across, 3, heads, channels // heads
        )
        query, key, value = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind()  # (B, h, w, M, N, D)
        logits: Tensor = (query * self.attn.scale) @ key.mT + self.attn._get_rel_pos_bias()
        if any(self.shift_size):
            logits = logits + self.apart(height, width, x)
        weights = self.attn.attn_drop(logits.softmax(-1))
        attended = (weights @ value).unflatten(-2, self.window_size).permute(0, 1, 4, 2, 5, 3, 6)
        result: Tensor = self.attn.proj_drop(self.attn.proj(attended.reshape(batch, height, width, channels)))
        return result

    def apart(self, height: int, width: int, like: Tensor) -> Tensor:
        """(h, w, 1, N, N): -100 between places that lie together only because the map was shifted around its edges."""
        rows, columns = (
            regions(*side, like.device)
            for side in zip((height, width), self.window_size, self.shift_size, strict=True)
        )
        both = (3 * rows[:, None, :, None] + columns[None, :, None, :]).flatten(2)  # (h, w, N)
        other = both[:, :, None, :, None] != both[:, :, None, None, :]
        return torch.zeros_like(other, dtype=like.dtype).masked_fill(other, -100.0)


def regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(size / window, window): which places of one side lay together before it was shifted, of each window."""
    place = torch.arange(size, device=device)
    region = (place >= size - window).int() + (place >= size - shift).int()
    return region.view(size // window, window)


class PaddedMerging(PatchMerging):
    """timm's own function, of sizes that stay simple for an exporter: those of all later maps follow from them."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> half as high and wide, rounded up."""
        x = padded(x, (2, 2))
        batch, height, width, channels = x.shape
        squares = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.reduction(self.norm(squares.flatten(3)))
        return merged


def padded(x: Tensor, unit: tuple[int, int]) -> Tensor:
    """x (B, H, W, C) with zeros at the bottom and on the right, to whole multiples of a size.

    Rounded up as (n - 1) // part + 1: of such terms those of all later maps fold into one, where n is an exporter's symbol.
    """
    down, right = (((n - 1) // part + 1) * part - n for n, part in zip(x.shape[1:3], unit, strict=True))
    return F.pad(x, (0, 0, 0, right, 0, down))
