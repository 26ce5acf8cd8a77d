"""The deformable decoder (sec. 4.1) and iterative bounding box refinement (sec. 4.2, appendix A.4).

Every query looks around its reference, a point or a box, and each layer predicts its box relative to that reference. With
refinement the box of one layer, detached, is the reference of the next; without, the reference stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrcli.nn.dropout import Dropout
from detrcli.nn.layers import inverse_sigmoid
from detrcli.ops import Shapes
from detrcli_deformable_detr.attention import DeformableAttention
from detrcli_deformable_detr.encoder import xavier_linears
from detrcli_deformable_detr.levels import Tokens, in_levels
from detrcli_detr.transformer import Attention, FeedForward


class Queries(NamedTuple):
    """What a decoder starts from."""

    content: Tensor  # (B, Q, C)
    position: Tensor  # (B, Q, C), added to the content wherever it asks
    reference: Tensor  # (B, Q, 2) points or (B, Q, 4) boxes cxcywh, in [0, 1] of the unpadded picture


class Answer(NamedTuple):
    """What one decoder layer says, and the reference it said it about."""

    embedding: Tensor  # (B, Q, C)
    boxes: Tensor  # (B, Q, 4) cxcywh
    reference: Tensor  # (B, Q, 2 or 4)


class DecoderLayer(nn.Module):
    """x = norm1(x + SelfAttention); x = norm2(x + DeformableAttention into memory); x = norm3(x + FFN(x))."""

    def __init__(self, width: int, heads: int, levels: int, points: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = DeformableAttention(width, heads, levels, points)
        self.ffn = FeedForward(width, ffn, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        mask: Tensor | None,
    ) -> Tensor:
        """x and position (B, Q, C), reference (B, Q, L, 2 or 4), memory (B, S, C), mask (B, S) -> (B, Q, C)."""
        query = x + position
        x = self.norm1(x + self.dropout(self.self_attn.attend(query, query, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + position, reference, memory, shapes, mask)))
        x = self.norm3(x + self.dropout(self.ffn(x)))
        return x


class Decoder(nn.Module):
    def __init__(
        self, layers: int, width: int, heads: int, levels: int, points: int, ffn: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, levels, points, ffn, dropout) for _ in range(layers)
        )
        xavier_linears(self)

    def forward(
        self, queries: Queries, memory: Tensor, tokens: Tokens, box_heads: Sequence[nn.Module], refine: bool
    ) -> list[Answer]:
        """Every layer's answer; memory (B, S, C), one box head a layer (the same one again where they are shared)."""
        x, position, reference = queries
        answers = []
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            levels = in_levels(reference, tokens.ratios)
            x = layer(x, position, levels, memory, tokens.shapes, tokens.mask)
            boxes = move_boxes(box_head(x), reference)
            answers.append(Answer(x, boxes, reference))
            if refine:
                reference = boxes.detach()
        return answers


def move_boxes(delta: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """Boxes (..., 4) that lie `delta` (..., 4), in logits, from their reference: all of a box, the centre of a point.

    References count as at least `eps` away from 0 and 1.
    """
    delta = delta.to(torch.promote_types(delta.dtype, reference.dtype))
    known = reference.shape[-1]
    return torch.cat((delta[..., :known] + inverse_sigmoid(reference, eps), delta[..., known:]), -1).sigmoid()
