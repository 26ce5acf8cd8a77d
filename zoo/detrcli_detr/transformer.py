"""The transformer of DETR (sec. 3.2 and fig. 10 of the paper): post-norm, positions added wherever queries and keys are made.

    encoder:  x = norm1(x + SelfAttention(x + pos, x + pos, x));  x = norm2(x + FFN(x))
    decoder:  x = norm1(x + SelfAttention(x + query, x + query, x))
              x = norm2(x + CrossAttention(x + query, memory + pos, memory));  x = norm3(x + FFN(x))

Values never carry positions. Padding is hidden from the keys. Every decoder layer's output passes the same last norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from detrcli.nn.dropout import Dropout
from detrcli.nn.layers import LinearReLU


class Attention(nn.MultiheadAttention):
    """Multi-head attention with batch first that returns only its answer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout=dropout, batch_first=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, Q, C), key and value (B, S, C), mask (B, S) True where keys are padding."""
        answer: Tensor = self(query, key, value, key_padding_mask=mask, need_weights=False)[0]
        return answer


class FeedForward(nn.Module):
    """Two linear layers around ReLU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = LinearReLU(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(self.linear1(x)))
        return out


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.ffn = FeedForward(width, ffn, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x and position (B, S, C), mask (B, S) -> (B, S, C)."""
        query = x + position
        x = self.norm1(x + self.dropout(self.self_attn.attend(query, query, x, mask)))
        x = self.norm2(x + self.dropout(self.ffn(x)))
        return x


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.ffn = FeedForward(width, ffn, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """x and query positions (B, Q, C), memory and key = memory + position (B, S, C), mask (B, S) -> (B, Q, C)."""
        placed = x + query
        x = self.norm1(x + self.dropout(self.self_attn.attend(placed, placed, x)))
        x = self.norm2(x + self.dropout(self.cross_attn.attend(x + query, key, memory, mask)))
        x = self.norm3(x + self.dropout(self.ffn(x)))
        return x


class Encoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn, dropout) for _ in range(layers))

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, mask)
        return x


class Decoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, memory: Tensor, position: Tensor, mask: Tensor) -> list[Tensor]:
        """query (B, Q, C), memory and position (B, S, C), mask (B, S) -> every layer's answer (B, Q, C), normalised."""
        key = memory + position
        x = query.new_zeros(query.shape)
        answers = []
        for layer in self.layers:
            x = layer(x, query, memory, key, mask)
            answers.append(self.norm(x))
        return answers
