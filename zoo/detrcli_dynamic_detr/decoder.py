"""The dynamic decoder (sec. 3.3): queries look at their boxes through filters that they make themselves.

    Q* = LN(Q + SelfAttention(Q));   F = RoIAlign(P, B);   W = Linear(Q*)
    Q  = LN(Q* + Linear(flatten(ReLU(LN(F · W)))));   Q = LN(Q + FFN(Q))
    C  = Linear(Q);   B = B moved by Linear(Q)

Where the formulas stop, the layer follows Sparse R-CNN (Sun et al., CVPR 2021), whose head is the case of two filters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrcli.ops.msda import like
from detrcli_dynamic_detr.config import DynamicDetrConfig

MAX_GROWTH = math.log(100_000 / 16)  # of a side in one layer, as a logarithm (Sparse R-CNN)
FARTHEST = 1e6  # pictures; a box that diverges stays finite, so that its loss does


class DynamicFilters(nn.Module):
    """1x1 convolutions of each box's features with filters made from its query, then all bins to one vector."""

    def __init__(self, width: int, filter_width: int, filters: int, bins: int) -> None:
        super().__init__()
        widths = [width, filter_width, width][: filters + 1]
        self.shapes = [(widths[i], widths[i + 1]) for i in range(filters)]
        self.generate = nn.Linear(width, filters * width * filter_width)
        self.norms = nn.ModuleList(nn.LayerNorm(out) for _, out in self.shapes)
        self.output = nn.Linear(bins * widths[-1], width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, features: Tensor) -> Tensor:
        """query (..., C), features (..., bins, C) -> (..., C)."""
        filters = self.generate(query).chunk(len(self.shapes), -1)
        x = features.to(filters[0].dtype)  # pooled in float32
        for weight, shape, norm in zip(filters, self.shapes, self.norms, strict=True):
            x = norm(x @ weight.unflatten(-1, shape)).relu()
        out: Tensor = self.output_norm(self.output(x.flatten(-2))).relu()
        return out


class DynamicDecoderLayer(nn.Module):
    def __init__(self, config: DynamicDetrConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.filters = DynamicFilters(width, config.filter_width, config.dynamic_filters, config.pool_size**2)
        self.ffn = nn.Sequential(nn.Linear(width, config.ffn), nn.ReLU(), nn.Linear(config.ffn, width))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, query: Tensor, features: Tensor) -> Tensor:
        """query (B, Q, C) and the features of its boxes (B, Q, bins, C) -> (B, Q, C)."""
        query = self.norm1(query + self.self_attn(query, query, query, need_weights=False)[0])
        query = self.norm2(query + self.filters(query, features))
        query = self.norm3(query + self.ffn(query))
        return query


class Head(nn.Module):
    """Hidden layers of (linear, norm, ReLU) and a linear answer."""

    def __init__(self, width: int, hidden: int, answers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(hidden):
            layers += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.answer = nn.Linear(width, answers)

    def forward(self, query: Tensor) -> Tensor:
        out: Tensor = self.answer(self.hidden(query))
        return out


def move(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes cxcywh moved by deltas (dx, dy, dw, dh): the centre by parts of the box's own size, the size by a factor."""
    deltas = deltas.to(boxes.dtype) / like(boxes, weights)
    centre, size = boxes[..., :2], boxes[..., 2:]
    moved = centre + deltas[..., :2] * size
    grown = size * deltas[..., 2:].clamp(max=MAX_GROWTH).exp()
    return torch.cat((moved, grown), -1).clamp(-FARTHEST, FARTHEST)
