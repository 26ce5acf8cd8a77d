"""The pyramid P3 to P7: FPN (Lin et al., CVPR 2017) with two levels above, as RetinaNet, ATSS and Dynamic Head build it.

M5 = lateral(C5);  Ml = lateral(Cl) + upsample(Ml+1);  Pl = conv3x3(Ml);  P6 = conv3x3/2(P5);  P7 = conv3x3/2(ReLU(P6))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Backbone maps, finest first -> as many maps and `extra` above, all `width` wide, each half the size (rounded up)."""

    def __init__(self, channels: Sequence[int], width: int, extra: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.extra = nn.ModuleList(nn.Conv2d(width, width, 3, 2, padding=1) for _ in range(extra))
        for conv in (*self.lateral, *self.output, *self.extra):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:])
        maps = [conv(x) for conv, x in zip(self.output, maps, strict=True)]
        for i, conv in enumerate(self.extra):
            maps.append(conv(maps[-1].relu() if i else maps[-1]))
        return maps
