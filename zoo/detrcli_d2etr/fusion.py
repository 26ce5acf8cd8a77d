"""Computationally efficient cross-scale attention, CECA (sec. 3 of the paper), over the maps of any backbone.

    x_1* = project(C3);   x_k* = norm(CECA blocks(project(C_k); keys of x_1*, …, x_{k-1}*, x_k))

Each map attends to itself and to the fused maps before it, each of them pooled to P x P keys. The maps of the backbone never
read the fused ones. Pooling has no weights: a fused map is pooled once, for all blocks of all later maps.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath  # type: ignore[attr-defined]  # not listed in its __all__
from torch import Tensor, nn

from detrcli.nn.backbone import resize_mask
from detrcli.nn.layers import LinearReLU
from detrcli_deformable_detr.levels import Map

logger = logging.getLogger("detrcli.d2etr")

Size = tuple[int, int]  # height, width
Residual = Literal["official", "prenorm"]
FINE = 1e-6  # epsilon of the norms around blocks; others have torch's


class CrossScaleFusion(nn.Module):
    """The backbone's maps, finest first -> as many fused ones (and a coarser one) of one width."""

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        coarser: bool,
        blocks: int,
        heads: int,
        ffn: int,
        pool: int,
        residual: Residual = "official",
        drop_path: float = 0.0,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.pool, self.masked = pool, masked
        projections = [Projection(c, width, 1) for c in channels]
        if coarser:  # of the backbone's last map itself, not of the fused one
            projections.append(Projection(channels[-1], width, 3))
        self.projections = nn.ModuleList(projections)
        rates = drop_rates(drop_path, stages=len(projections) - 1, blocks=blocks)
        self.stages = nn.ModuleList(
            FusingStage(width, heads, ffn, scales=k, pool=pool, residual=residual, drop_rates=rates)
            for k in range(2, len(projections) + 1)
        )
        _initialise(self)

    def forward(self, maps: Sequence[Map], mask: Tensor, padded: bool = True) -> list[Map]:
        """maps with their padding; mask (B, H, W) of the pictures, `padded` False says that it is empty."""
        projected, masks = self._project(maps, mask)
        hidden = masks if padded and self.masked else [None] * len(masks)
        fused, pools = projected[:1], []
        for stage, x, before, padding in zip(self.stages, projected[1:], hidden, hidden[1:], strict=False):
            pools.append(pool_map(fused[-1], self.pool, before))
            fused.append(stage(x, pools, padding))
        _tell_of_large_pool(self.pool, (fused[-1].shape[2], fused[-1].shape[3]))
        return list(zip(fused, masks, strict=True))

    def _project(self, maps: Sequence[Map], mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps at the common width, and a coarser one of the last if wanted; with their padding."""
        projected = [project(x) for project, (x, _) in zip(self.projections, maps, strict=False)]
        masks = [m for _, m in maps]
        for project in self.projections[len(maps) :]:
            last, padding = maps[-1]
            projected.append(project(last.masked_fill(padding[:, None], 0.0) if self.masked else last))
            masks.append(resize_mask(mask, projected[-1]))
        return projected, masks


class Projection(nn.Module):
    """A convolution to the common width and a norm over channels; halves the map if its kernel is 3."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride=(kernel + 1) // 2, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class FusingStage(nn.Module):
    """One map through its CECA blocks and a last norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        *,
        scales: int,
        pool: int,
        residual: Residual,
        drop_rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CecaBlock(width, heads, ffn, scales=scales, pool=pool, residual=residual, drop_path=rate)
            for rate in drop_rates
        )
        self.norm = nn.LayerNorm(width, FINE)

    def forward(self, x: Tensor, pools: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), the pooled maps before it (B, C, P, P), its padding (B, H, W) or None -> (B, C, H, W)."""
        size = (x.shape[2], x.shape[3])
        tokens = to_tokens(x)
        for block in self.blocks:
            tokens = block(tokens, size, pools, mask)
        return to_map(self.norm(tokens), size)


class CecaBlock(nn.Module):
    """Cross-scale attention and an MLP; what is added to what is the `residual` reading."""

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        *,
        scales: int,
        pool: int,
        residual: Residual = "official",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool, self.residual = pool, residual
        self.norm1 = nn.LayerNorm(width, FINE)
        self.attn = CrossScaleAttention(width, heads, scales)
        self.norm2 = nn.LayerNorm(width, FINE)
        self.mlp = ConvolvingMLP(width, ffn)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Size, pools: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """x (B, S, C) of a map of `size`, earlier maps pooled (B, C, P, P) -> (B, S, C)."""
        normed = self.norm1(x)
        own = pool_map(to_map(normed, size), self.pool, mask)
        attended: Tensor = self.drop_path(self.attn(normed, [*pools, own]))
        x = attended + (x if self.residual == "prenorm" else normed)
        hidden: Tensor = self.mlp(self.norm2(x), size, mask)
        out: Tensor = self.drop_path(hidden) + (x if self.residual == "prenorm" else hidden)
        return out


class CrossScaleAttention(nn.Module):
    """Tokens of one map attend to the pooled keys of all maps so far, in one softmax; each map has its own embedding of keys."""

    def __init__(self, width: int, heads: int, scales: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(scales))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(scales))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, pools: Sequence[Tensor]) -> Tensor:
        """x (B, S, C), one pooled map (B, C, P, P) a scale -> (B, S, C)."""
        keys = [
            F.gelu(norm(to_tokens(sr(pool))))
            for sr, norm, pool in zip(self.sr, self.norm, pools, strict=True)
        ]
        key, value = self.kv(torch.cat(keys, 1)).chunk(2, -1)  # (B, scales * P * P, C)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), key, value)
        )
        answer = F.scaled_dot_product_attention(query, key, value)  # (B, M, S, D)
        out: Tensor = self.proj(answer.transpose(1, 2).flatten(2))
        return out


class ConvolvingMLP(nn.Module):
    """Two linear layers around ReLU, a depthwise 3x3 convolution on the map, and GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = LinearReLU(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, size: Size, mask: Tensor | None) -> Tensor:
        """x (B, S, C) of a map of `size`; padding (B, H, W) counts as zero where given."""
        hidden = to_map(self.fc1(x), size)
        if mask is not None:
            hidden = hidden.masked_fill(mask[:, None], 0.0)
        out: Tensor = self.fc2(F.gelu(to_tokens(self.dwconv(hidden))))
        return out


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), row by row."""
    return x.flatten(2).mT


def to_map(x: Tensor, size: Size) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W)."""
    return x.mT.view(*x.mT.shape[:2], *size)


def pool_map(x: Tensor, parts: int, mask: Tensor | None) -> Tensor:
    """(B, C, H, W) -> (B, C, P, P), over the unpadded part alone where a mask (B, H, W) is given."""
    if mask is None:
        whole: Tensor = F.adaptive_avg_pool2d(x, parts)
        return whole
    rows, columns = (~mask[:, :, 0]).sum(1), (~mask[:, 0, :]).sum(1)  # (B,), of the unpadded part
    down = pooling_weights(rows, x.shape[2], parts).to(x.dtype)[:, None]
    across = pooling_weights(columns, x.shape[3], parts).to(x.dtype)[:, None]
    pooled: Tensor = down @ x @ across.mT
    return pooled


def pooling_weights(counts: Tensor, length: int, parts: int) -> Tensor:
    """The matrix (B, P, length) that means over P parts of the first `counts` (B,) places, as adaptive pooling cuts them."""
    part = torch.arange(parts, device=counts.device)
    count = counts.clamp(min=1)[:, None]
    start = part * count // parts
    stop = ((part + 1) * count + parts - 1) // parts  # rounded up
    place = torch.arange(length, device=counts.device)
    inside = (place >= start[..., None]) & (place < stop[..., None])
    return inside / (stop - start)[..., None]


def _tell_of_large_pool(pool: int, size: Size) -> None:
    if pool > min(size):
        _tell_once(
            f"pool ({pool}) is larger than the coarsest fused map ({size[1]}x{size[0]}): keys repeat; for small pictures "
            f"set model.pool={min(size)}"
        )


@functools.cache
def _tell_once(text: str) -> None:
    logger.warning(text)


def drop_rates(last: float, *, stages: int, blocks: int) -> list[float]:
    """Stochastic depth of a stage's blocks. As in the authors' code the rates rise through all blocks of all stages, but every
    stage takes the first ones."""
    return [last * i / max(1, stages * blocks - 1) for i in range(blocks)]


def _initialise(module: nn.Module) -> None:
    """As PVT v2: truncated normal matrices, convolutions by their fan-out."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d):
            fan_out = math.prod(child.kernel_size) * child.out_channels // child.groups
            nn.init.normal_(child.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(child.bias)  # type: ignore[arg-type]  # a Conv2d has one unless told otherwise
