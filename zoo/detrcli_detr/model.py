"""DETR (Carion et al., ECCV 2020, arXiv 2005.12872): a CNN, a transformer and a set of learned queries.

features = backbone(image);  memory = encoder(project(features), sine positions)
answers  = decoder(queries, memory);  class = Linear(answer),  box = sigmoid(MLP(answer))        (fig. 2)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import Backbone
from detrcli.nn.layers import MLP
from detrcli.nn.position import sine_positions
from detrcli.types import Output
from detrcli_detr.config import DetrConfig
from detrcli_detr.transformer import Decoder, Encoder


class Detr(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) -> logits (B, Q, K + 1), the last channel "no object", and boxes (B, Q, 4)."""

    def __init__(self, config: DetrConfig, num_classes: int) -> None:
        super().__init__()
        sizes = (config.width, config.heads, config.ffn, config.dropout)
        self.backbone = Backbone(config.backbone)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], config.width, 1)
        self.encoder = Encoder(config.encoder_layers, *sizes)
        self.query_embed = nn.Embedding(config.num_queries, config.width)
        self.decoder = Decoder(config.decoder_layers, *sizes)
        self.class_head = nn.Linear(config.width, num_classes + 1)
        self.box_head = MLP(config.width, config.width, 4, 3)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        features, padding = self.backbone(images, mask)[-1]
        x = self.input_proj(features)
        position = sine_positions(padding, x.shape[1]).to(x.dtype)
        x, position, padding = x.flatten(2).mT, position.flatten(2).mT, padding.flatten(1)
        memory = self.encoder(x, position, padding)
        query = self.query_embed.weight.expand(images.shape[0], -1, -1)
        *earlier, last = (self._answer(a) for a in self.decoder(query, memory, position, padding))
        return Output(last.logits, last.boxes, aux=tuple(earlier))

    def _answer(self, embedding: Tensor) -> Output:
        return Output(self.class_head(embedding), self.box_head(embedding).sigmoid())
