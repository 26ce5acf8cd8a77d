"""The deformable encoder (sec. 4.1): every pixel of every level is a query, its reference is itself."""

from __future__ import annotations

from torch import Tensor, nn

from detrcli.nn.dropout import Dropout
from detrcli.ops import Shapes
from detrcli_deformable_detr.attention import DeformableAttention
from detrcli_deformable_detr.levels import Tokens, in_levels, token_centres
from detrcli_detr.transformer import FeedForward


class EncoderLayer(nn.Module):
    """x = norm1(x + Attention(x + position, x)); x = norm2(x + FFN(x))."""

    def __init__(self, width: int, heads: int, levels: int, points: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.ffn = FeedForward(width, ffn, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, mask: Tensor | None
    ) -> Tensor:
        """x and position (B, S, C), reference (B, S, L, 2), mask (B, S) -> (B, S, C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, shapes, mask)))
        x = self.norm2(x + self.dropout(self.ffn(x)))
        return x


class Encoder(nn.Module):
    def __init__(
        self, layers: int, width: int, heads: int, levels: int, points: int, ffn: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, levels, points, ffn, dropout) for _ in range(layers)
        )
        xavier_linears(self)

    def forward(self, tokens: Tokens) -> Tensor:
        """The memory (B, S, C)."""
        x = tokens.x
        reference = in_levels(token_centres(tokens), tokens.ratios)
        for layer in self.layers:
            x = layer(x, tokens.position, reference, tokens.shapes, tokens.mask)
        return x


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform matrices everywhere but in deformable attention, which starts as it says itself."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, DeformableAttention):
            child.reset_parameters()
