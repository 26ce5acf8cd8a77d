"""The dynamic encoder (sec. 3.2): convolutions that attend in space, over scales and over channels, instead of self-attention.

    s, m = split(conv3x3(Pl))                                  where the nine taps of level l look, and how much each counts
    P+   = {DeformConv(P(l-1), s, m), DeformConv(Pl, s, m), DeformConv(P(l+1), s, m)}            spatial attention
    Pl   = DyReLU( mean over P+ of  hard_sigmoid(ReLU(conv1x1(avgpool(P+)))) · P+ )              scale attention, DyReLU

This is the DyConv of Dynamic Head. Weights are shared by all levels of a layer; offsets by the three convolutions of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrcli_dynamic_detr.config import DynamicDetrConfig, NeighbourOrder, Operators
from detrcli_dynamic_detr.operators import TAPS, deform_conv2d

Sampling = tuple[Tensor, Tensor]  # offsets (B, 18, H, W) and masks (B, 9, H, W)


class DyReLU(nn.Module):
    """max(a1 x + b1, a2 x + b2) with coefficients of an image's channels made from their means (Chen et al., ECCV 2020)."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // reduction)
        self.excite = nn.Linear(width // reduction, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        code = F.hardsigmoid(self.excite(self.squeeze(x.mean((2, 3))).relu())) - 0.5
        a1, b1, a2, b2 = code[..., None, None].chunk(4, 1)
        return torch.maximum(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2)


class ScaleAttention(nn.Module):
    """The mean of a level's branches, each times a weight made from its channel means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(width, 1)
        nn.init.normal_(self.weigh.weight, std=0.01)
        nn.init.zeros_(self.weigh.bias)

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        """Two or three maps (B, C, H, W) -> one."""
        share = 1 / len(branches)
        weighted = [branch * (share * self.weight_of(branch))[..., None, None] for branch in branches]
        return reduce(torch.add, weighted)

    def weight_of(self, branch: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1) in [0.5, 1]."""
        weight: Tensor = self.weigh(branch.mean((2, 3)))
        return F.hardsigmoid(weight.relu())


class ModulatedConv(nn.Module):
    """A deformable 3x3 convolution that is told where to look, and a group norm."""

    def __init__(self, width: int, stride: int, groups: int, form: Operators) -> None:
        super().__init__()
        self.stride, self.form = stride, form
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.GroupNorm(groups, width)
        bound = (TAPS * width) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, sampling: Sampling) -> Tensor:
        answer = deform_conv2d(x, *sampling, self.weight, self.bias, stride=self.stride, form=self.form)
        out: Tensor = self.norm(answer.to(self.weight.dtype))  # summed in float32
        return out


class DynamicEncoderLayer(nn.Module):
    """Maps of all levels, finest first, each half the one before (rounded up) -> maps of the same shapes."""

    def __init__(self, config: DynamicDetrConfig) -> None:
        super().__init__()
        width = config.width
        options = (config.norm_groups, config.operators)
        self.order: NeighbourOrder = config.neighbour_order
        self.offset = nn.Conv2d(width, 3 * TAPS, 3, padding=1)
        self.coarser = ModulatedConv(width, 1, *options)
        self.same = ModulatedConv(width, 1, *options)
        self.finer = ModulatedConv(width, 2, *options)
        self.scale_attention = ScaleAttention(width)
        self.activation = DyReLU(width, config.dyrelu_reduction)
        if config.offset_init == "zero":
            for parameter in self.offset.parameters():
                nn.init.zeros_(parameter)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.activation(self.scale_attention(self._branches(maps, i))) for i in range(len(maps))]

    def _branches(self, maps: list[Tensor], i: int) -> list[Tensor]:
        """Level i as it, its finer and its coarser neighbour see it."""
        sampling = self.sampling(maps[i])
        branches = [self.same(maps[i], sampling)]
        if i > 0:
            branches.append(self.finer(maps[i - 1], sampling))
        if i + 1 < len(maps):
            branches.append(self._coarser(maps[i + 1], sampling))
        return branches

    def sampling(self, x: Tensor) -> Sampling:
        code: Tensor = self.offset(x)
        # A NaN would be an address outside the map; the mask, which is NaN then too, carries it on to the loss.
        offset = code[:, : 2 * TAPS].nan_to_num(0.0)
        return offset, code[:, 2 * TAPS :].sigmoid()

    def _coarser(self, x: Tensor, sampling: Sampling) -> Tensor:
        size = sampling[0].shape[-2:]
        if self.order == "upsample_first":
            answer: Tensor = self.coarser(_resize(x, size, align=True), sampling)
            return answer
        offset, mask = (_resize(part, x.shape[-2:], align=False) for part in sampling)
        return _resize(self.coarser(x, (offset, mask)), size, align=True)


class DynamicEncoder(nn.Module):
    def __init__(self, config: DynamicDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DynamicEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        for layer in self.layers:
            maps = layer(maps)
        return maps


def _resize(x: Tensor, size: Sequence[int], *, align: bool) -> Tensor:
    out: Tensor = F.interpolate(x, size=list(size), mode="bilinear", align_corners=align)
    return out
