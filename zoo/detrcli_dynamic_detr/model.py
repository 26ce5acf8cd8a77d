"""Dynamic DETR (Dai et al., ICCV 2021): a pyramid, a dynamic encoder over its levels, a dynamic decoder over boxes.

maps = encoder(FPN(backbone(image)));  per decoder layer: query = layer(query, RoIAlign(maps, box)), class, box moved   (fig. 2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrcli.errors import ModelError
from detrcli.nn.backbone import Backbone
from detrcli.types import Output
from detrcli_dynamic_detr.config import DynamicDetrConfig
from detrcli_dynamic_detr.decoder import DynamicDecoderLayer, Head, move
from detrcli_dynamic_detr.encoder import DynamicEncoder
from detrcli_dynamic_detr.fpn import FPN
from detrcli_dynamic_detr.pooling import Pooling, draw

PRIOR = 0.01  # probability that focal models give every class at first (RetinaNet)


class DynamicDetr(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) -> logits (B, Q, K), or (B, Q, K + 1) with softmax, and boxes (B, Q, 4).

    While training, boxes may leave the picture: the loss needs to see by how much. Otherwise they are clipped to it.
    """

    def __init__(self, config: DynamicDetrConfig, num_classes: int) -> None:
        super().__init__()
        self.delta_weights = config.delta_weights
        self.backbone = Backbone(config.backbone)
        _check_strides(config, self.backbone.strides)
        self.fpn = FPN(self.backbone.channels, config.width, config.extra_levels)
        self.encoder = DynamicEncoder(config)
        self.pool = Pooling(
            levels=config.levels,
            size=config.pool_size,
            samples=config.pool_samples,
            canonical_size=config.canonical_size,
            canonical_level=config.canonical_level,
            form=config.operators,
        )
        self.query_embed = nn.Embedding(config.num_queries, config.width)
        self.box_embed = nn.Embedding(config.num_queries, 4)
        layers, channels = range(config.decoder_layers), num_classes + (config.class_loss == "softmax")
        self.decoder = nn.ModuleList(DynamicDecoderLayer(config) for _ in layers)
        self.class_heads = nn.ModuleList(Head(config.width, config.class_layers, channels) for _ in layers)
        self.box_heads = nn.ModuleList(Head(config.width, config.box_layers, 4) for _ in layers)
        self._init_decoder(config)

    def _init_decoder(self, config: DynamicDetrConfig) -> None:
        for part in (self.decoder, self.class_heads, self.box_heads):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        if config.box_init == "zero":
            for parameter in answers_of(self.box_heads):
                nn.init.zeros_(parameter)
        if config.class_loss == "focal":
            for parameter in answers_of(self.class_heads):
                if parameter.dim() == 1:
                    nn.init.constant_(parameter, -math.log((1 - PRIOR) / PRIOR))
        start = torch.tensor(config.start_box)
        self.box_embed.weight.data.copy_(start.expand_as(self.box_embed.weight))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        maps = self.encoder(self.fpn([features for features, _ in self.backbone(images, mask)]))
        *earlier, last = self._decode(maps, picture_sizes(mask))
        return Output(last.logits, last.boxes, aux=tuple(earlier))

    def _decode(self, maps: list[Tensor], sizes: Tensor) -> list[Output]:
        canvas = draw(maps)
        query = self.query_embed.weight.expand(sizes.shape[0], -1, -1)
        start = self.box_embed.weight
        exact = torch.promote_types(start.dtype, torch.float32)  # geometry is never computed in less
        boxes = start.to(exact).expand(sizes.shape[0], -1, -1)
        answers = []
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads, strict=True):
            query = layer(query, self.pool(canvas, boxes, sizes))
            moved = move(boxes, box_head(query), self.delta_weights)
            answers.append(Output(class_head(query), moved if self.training else clipped(moved)))
            boxes = moved.detach()  # each layer learns its own step; only the start is learned through
        return answers


def answers_of(heads: nn.ModuleList) -> list[nn.Parameter]:
    """Weights and biases of the heads' last layers."""
    return [parameter for name, parameter in heads.named_parameters() if ".answer." in name]


def picture_sizes(mask: Tensor) -> Tensor:
    """Height and width without padding, (B, 2), at least 1."""
    valid = ~mask
    return torch.stack((valid.any(2).sum(1), valid.any(1).sum(1)), 1).clamp(min=1)


def clipped(boxes: Tensor) -> Tensor:
    """Normalised cxcywh with every edge inside the picture."""
    return xyxy_to_cxcywh(cxcywh_to_xyxy(boxes).clamp(0, 1))


def _check_strides(config: DynamicDetrConfig, strides: tuple[int, ...]) -> None:
    wanted = tuple(2**level for level in config.backbone.levels)
    if strides != wanted:
        raise ModelError(
            f"the maps of {config.backbone.name} have strides {strides}; the pyramid needs {wanted}",
            hint="choose a backbone whose stages halve the map, or other levels: --set model.backbone.levels=[3, 4, 5]",
        )
