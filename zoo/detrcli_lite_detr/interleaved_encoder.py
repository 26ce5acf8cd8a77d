"""The interleaved encoder (sec. 3.2 and 3.3, fig. 2): few tokens are updated often, the many of the finest levels rarely.

Tokens come finest level first: the low-level ones, three quarters of all, then the high-level ones. Whatever a layer updates,
its queries look at all tokens as the layer before left them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrcli.nn.dropout import Dropout
from detrcli.ops import Shapes
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_deformable_detr.levels import Tokens, in_levels, token_centres
from detrcli_detr.transformer import FeedForward
from detrcli_lite_detr.config import DinoConfig, Interleaving, Kind, schedule
from detrcli_lite_detr.kda import encoder_attention, start


class Feed(nn.Module):
    """norm(x + FFN(x))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ffn = FeedForward(width, hidden, dropout)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        fed: Tensor = self.norm(x + self.dropout(self.ffn(x)))
        return fed


class InterleavedLayer(nn.Module):
    """x = norm1(x + Attention(x + position, all)), then norm2(x + FFN(x)), for the tokens that are this layer's to update.

    In a layer that updates low tokens, these have a smaller feed-forward with its norm, unless `low_ffn` is None.
    """

    def __init__(
        self, kind: Kind, attention: nn.Module, width: int, ffn: int, low_ffn: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.self_attn = attention
        self.norm1 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        if kind != "low" or low_ffn is None:
            self.ffn = FeedForward(width, ffn, dropout)
            self.norm2 = nn.LayerNorm(width)
        self.low = Feed(width, low_ffn, dropout) if kind != "high" and low_ffn is not None else None

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, mask: Tensor | None, low: int
    ) -> Tensor:
        """x and position (B, S, C), reference (B, S, L, 2), mask (B, S); the first `low` of S tokens are low -> (B, S, C)."""
        first, last = (low if self.kind == "high" else 0), (low if self.kind == "low" else x.shape[1])
        asking = x[:, first:last]
        query, place = asking + position[:, first:last], reference[:, first:last]
        asking = self.norm1(asking + self.dropout(self.self_attn(query, place, x, shapes, mask)))
        return torch.cat((x[:, :first], *self.feed(asking, low), x[:, last:]), 1)

    def feed(self, y: Tensor, low: int) -> tuple[Tensor, ...]:
        """The feed-forward of updated tokens y (B, Q, C), in pieces along Q."""
        if self.low is None:
            return (self.large(y),)
        if self.kind == "low":
            return (self.low(y),)
        return self.low(y[:, :low]), self.large(y[:, low:])

    def large(self, y: Tensor) -> Tensor:
        fed: Tensor = self.norm2(y + self.dropout(self.ffn(y)))
        return fed


class InterleavedEncoder(nn.Module):
    def __init__(self, choice: Interleaving, host: DeformableDetrConfig | DinoConfig) -> None:
        super().__init__()
        self.low_levels = host.levels - choice.high_levels
        self.layers = nn.ModuleList(
            InterleavedLayer(
                kind, encoder_attention(choice, host), host.width, host.ffn, choice.low_ffn, host.dropout
            )
            for kind in schedule(host.encoder_layers, choice.blocks, choice.reading)
        )
        start(self)

    def forward(self, tokens: Tokens) -> Tensor:
        """The memory (B, S, C)."""
        x = tokens.x
        low = sum(height * width for height, width in tokens.shapes[: self.low_levels])
        reference = in_levels(token_centres(tokens), tokens.ratios)
        for layer in self.layers:
            x = layer(x, tokens.position, reference, tokens.shapes, tokens.mask, low)
        return x
