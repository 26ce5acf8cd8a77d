"""From a backbone's maps to the tokens of a multi-scale transformer (sec. 4.1 and fig. 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import resize_mask
from detrcli.nn.position import TEMPERATURE, sine_positions
from detrcli.ops.msda import like

Map = tuple[Tensor, Tensor]  # features (B, C, H, W) and padding (B, H, W)


class Tokens(NamedTuple):
    """The pixels of all levels in one sequence, level by level, row by row."""

    x: Tensor  # (B, S, C)
    position: Tensor  # (B, S, C): sine encoding and the level's own vector
    mask: Tensor | None  # (B, S), True on padding; None when nothing is padded
    shapes: tuple[tuple[int, int], ...]  # height and width of each level
    sizes: Tensor  # (B, L, 2): unpadded width and height of each level, in its pixels
    ratios: Tensor  # (B, L, 2): the same as a share of the padded width and height


class Levels(nn.Module):
    """Brings every level to one width, adds coarser levels, flattens them.

    A 1x1 convolution for each map of the backbone; the first extra level is a stride-2 convolution of the backbone's last map
    itself, each further one of the level before. `offset` and `temperature` are those of the sine positions.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        levels: int,
        *,
        offset: float = -0.5,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.offset, self.temperature = offset, temperature
        extra = [channels[-1], *[width] * levels][: levels - len(channels)]
        self.input_proj = nn.ModuleList(
            [project(c, width, 1) for c in channels] + [project(c, width, 3) for c in extra]
        )
        self.level_embed = nn.Parameter(torch.randn(levels, width))

    def forward(self, maps: Sequence[Map], padded: bool = True) -> Tokens:
        """maps, finest first -> tokens; `padded` False says that no mask has any padding."""
        maps = self.pyramid(maps)
        positions = [
            self.position(mask, x) + embed.to(x.dtype)[:, None, None]
            for (x, mask), embed in zip(maps, self.level_embed, strict=True)
        ]
        return flatten(maps, positions, padded)

    def position(self, mask: Tensor, x: Tensor) -> Tensor:
        """Sine positions (B, C, H, W) of a map's unpadded pixels."""
        encoded = sine_positions(mask, x.shape[1], offset=self.offset, temperature=self.temperature)
        return encoded.to(x.dtype)

    def pyramid(self, maps: Sequence[Map]) -> list[Map]:
        """The maps at the transformer's width, with the extra levels."""
        last, mask = maps[-1]
        result = [(proj(x), m) for proj, (x, m) in zip(self.input_proj, maps, strict=False)]
        for proj in self.input_proj[len(maps) :]:
            last = proj(last)
            result.append((last, resize_mask(mask, last)))
        return result


def project(channels: int, width: int, kernel: int) -> nn.Sequential:
    """A convolution to the transformer's width, halving the map if its kernel is 3, and a group norm."""
    conv = nn.Conv2d(channels, width, kernel, stride=(kernel + 1) // 2, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # a Conv2d has one unless told otherwise
    return nn.Sequential(conv, nn.GroupNorm(32, width))


def flatten(maps: Sequence[Map], positions: Sequence[Tensor], padded: bool = True) -> Tokens:
    """Maps and their positions (B, C, H, W) of all levels as one sequence."""
    shapes = tuple((x.shape[2], x.shape[3]) for x, _ in maps)
    exact = torch.promote_types(maps[0][0].dtype, torch.float32)  # geometry is never computed in less
    sizes = torch.stack([unpadded_size(mask) for _, mask in maps], 1).to(exact)
    whole = like(sizes, [(w, h) for h, w in shapes])
    return Tokens(
        x=torch.cat([x.flatten(2).mT for x, _ in maps], 1),
        position=torch.cat([p.flatten(2).mT for p in positions], 1),
        mask=torch.cat([mask.flatten(1) for _, mask in maps], 1) if padded else None,
        shapes=shapes,
        sizes=sizes,
        ratios=sizes / whole,
    )


def unpadded_size(mask: Tensor) -> Tensor:
    """(B, 2): width and height without padding, for pictures padded at the bottom and on the right; mask (B, H, W)."""
    valid = ~mask
    return torch.stack((valid[:, 0, :].sum(1), valid[:, :, 0].sum(1)), 1)


def token_centres(tokens: Tokens) -> Tensor:
    """(B, S, 2): the centre of each token's pixel, x and y in [0, 1] of the unpadded picture (beyond 1 on padding)."""
    centres = []
    for level, (height, width) in enumerate(tokens.shapes):
        y, x = pixel_centres(height, tokens.sizes), pixel_centres(width, tokens.sizes)
        grid = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1)
        centres.append(grid / tokens.sizes[:, None, level])
    return torch.cat(centres, 1)


def pixel_centres(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device) + 0.5


def in_levels(reference: Tensor, ratios: Tensor) -> Tensor:
    """References (B, Q, 2 or 4) of the unpadded picture as (B, Q, L, 2 or 4) of each padded level."""
    return reference[:, :, None] * ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]
