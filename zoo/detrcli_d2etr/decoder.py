"""The dense decoder: DETR's layers over the fused maps, answering boxes relative to references as Deformable DETR does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detrcli_deformable_detr.decoder import Answer, Queries, move_boxes
from detrcli_deformable_detr.encoder import xavier_linears
from detrcli_deformable_detr.levels import Tokens
from detrcli_detr.transformer import DecoderLayer


class DenseDecoder(nn.Module):
    """Every query sees every token; keys carry positions, values do not."""

    def __init__(self, layers: int, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout) for _ in range(layers))
        xavier_linears(self)

    def forward(
        self, queries: Queries, memory: Tensor, tokens: Tokens, box_heads: Sequence[nn.Module], refine: bool
    ) -> list[Answer]:
        """Every layer's answer; memory (B, S, C), one box head a layer (the same one again where they are shared)."""
        x, position, reference = queries
        key = memory + tokens.position
        answers = []
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            x = layer(x, position, memory, key, tokens.mask)
            boxes = move_boxes(box_head(x), reference)
            answers.append(Answer(x, boxes, reference))
            if refine:
                reference = boxes.detach()
        return answers
