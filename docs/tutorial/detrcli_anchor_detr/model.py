"""Anchor DETR (Wang et al., AAAI 2022, arXiv 2109.07107): queries that are points in the picture.

    query position = MLP(sine(anchor))      query content = one of a few patterns          (sec. 3.2, 3.3)
    box = sigmoid(MLP(answer) + logit(anchor))  for its centre, sigmoid(MLP(answer)) for its size

Encoder and decoder layers are DETR's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import Backbone
from detrcli.nn.layers import MLP, inverse_sigmoid
from detrcli.nn.position import sine, sine_positions
from detrcli.types import Output
from detrcli_anchor_detr.config import AnchorDetrConfig
from detrcli_detr.transformer import DecoderLayer, Encoder


class AnchorDetr(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) True on padding -> logits (B, Q, K), boxes (B, Q, 4); Q = anchors * patterns."""

    def __init__(self, config: AnchorDetrConfig, num_classes: int) -> None:
        super().__init__()
        sizes = (config.width, config.heads, config.ffn, config.dropout)
        self.backbone = Backbone(config.backbone)
        self.input_proj = nn.Sequential(
            nn.Conv2d(self.backbone.channels[-1], config.width, 1), nn.GroupNorm(8, config.width)
        )
        self.encoder = Encoder(config.encoder_layers, *sizes)
        self.anchors = nn.Parameter(torch.rand(config.anchors, 2))  # x, y in the unpadded picture
        self.patterns = nn.Embedding(config.patterns, config.width)
        self.anchor_mlp = MLP(config.width, config.width, config.width, 2)
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.class_head = nn.Linear(config.width, num_classes)
        self.box_head = MLP(config.width, config.width, 4, 3)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at a score of 0.01

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        features, padding = self.backbone(images, mask)[-1]
        x = self.input_proj(features)  # (B, C, H, W)
        position = sine_positions(padding, x.shape[1], offset=-0.5).to(x.dtype)  # of pixel centres
        x, position, padding = x.flatten(2).mT, position.flatten(2).mT, padding.flatten(1)
        memory = self.encoder(x, position, padding)  # (B, S, C)
        *earlier, last = self.decode(memory, memory + position, padding)
        return Output(last.logits, last.boxes, aux=tuple(earlier))

    def decode(self, memory: Tensor, key: Tensor, padding: Tensor) -> list[Output]:
        """Every decoder layer's answer; all patterns of the first anchor come first."""
        patterns = len(self.patterns.weight)
        anchors = self.anchors.repeat_interleave(patterns, 0)  # (Q, 2)
        place = self.anchor_mlp(encode(anchors, memory.shape[-1])).expand(memory.shape[0], -1, -1)
        x = self.patterns.weight.repeat(len(self.anchors), 1).expand(memory.shape[0], -1, -1)  # (B, Q, C)
        outputs = []
        for layer in self.decoder:
            x = layer(x, place, memory, key, padding)
            outputs.append(self.answer(self.norm(x), anchors))
        return outputs

    def answer(self, embedding: Tensor, anchors: Tensor) -> Output:
        offset = self.box_head(embedding)  # (B, Q, 4)
        centre = offset[..., :2] + inverse_sigmoid(anchors)
        return Output(self.class_head(embedding), torch.cat((centre, offset[..., 2:]), -1).sigmoid())


def encode(anchors: Tensor, channels: int) -> Tensor:
    """Points (Q, 2) as (Q, C), y first: the very encoding that `sine_positions` gives to a pixel at this place."""
    return sine(anchors.flip(-1) * 2 * math.pi, channels // 2).flatten(-2)
