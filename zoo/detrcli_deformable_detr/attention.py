"""Multi-scale deformable attention (sec. 4.1, eq. 3): each query looks at a few points around its reference, in every level.

    sum over heads of W_head [ sum over levels and points of A * value(reference + offset) ]

Offsets and weights A are linear in the query; the softmax of A runs over all levels and points of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrcli import ops
from detrcli.ops import Shapes


class DeformableAttention(nn.Module):
    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Before training, head h looks in direction 2πh/heads, point p at p + 1 pixels of each level, all with equal weight."""
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            ring = ring_offsets(self.heads, self.points)[:, None].expand(-1, self.levels, -1, -1)
            self.sampling_offsets.bias.copy_(ring.flatten())

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None
    ) -> Tensor:
        """query (B, Q, C), reference (B, Q, L, 2 or 4) in [0, 1] of the padded picture, memory (B, S, C), mask (B, S) -> (B, Q, C)."""
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.heads, self.levels * self.points))
        value = self.value_proj(memory).unflatten(-1, (self.heads, -1))
        answer: Tensor = self.output_proj(ops.msda_fused(value, shapes, reference, offsets, logits, mask))
        return answer


def ring_offsets(heads: int, points: int) -> Tensor:
    """(M, P, 2): one direction a head on the unit square, one distance a point."""
    angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(1, points + 1, dtype=torch.float32)[:, None]
