"""D²ETR (Lin et al., 2022, arXiv 2203.00860): no encoder; the backbone's maps are fused by cross-scale attention on their way out.

maps    = CrossScaleFusion(backbone(image))
queries = learned, or the maps' best proposals;  answers = decoder(queries, maps)
class, box, IoU, centerness of every answer;  while training, the class of every token
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import Backbone
from detrcli.nn.position import sine_positions
from detrcli.types import Output
from detrcli_d2etr.config import D2etrConfig
from detrcli_d2etr.decoder import DenseDecoder
from detrcli_d2etr.fusion import CrossScaleFusion
from detrcli_d2etr.location_aware import LocationHeads
from detrcli_d2etr.token_labels import TokenClasses, TokenEmbedding, TokenHead
from detrcli_deformable_detr.decoder import Answer, Decoder, Queries
from detrcli_deformable_detr.heads import box_mlp, class_linear
from detrcli_deformable_detr.levels import Map, Tokens, flatten
from detrcli_deformable_detr.model import SMALL
from detrcli_deformable_detr.two_stage import LearnedQueries, ProposedQueries, take, token_anchors


class D2etr(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) -> logits (B, Q, K), each class on its own, and boxes (B, Q, 4).

    Proposals and token labels serve the loss: they are answered while training only (proposals: unless they are kept).
    """

    def __init__(self, config: D2etrConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        self.fusion = build_fusion(config, self.backbone.channels)
        # a parameter of the official checkpoints, never trained; only the dense decoder adds it to its keys
        self.level_embed = nn.Parameter(torch.randn(config.decoded_maps, config.width), requires_grad=False)
        self.queries = build_queries(config, num_classes)
        self.decoder = build_decoder(config)
        heads = range(config.decoder_layers if config.refine else 1)  # shared where nothing is refined
        first = 0.0 if config.two_stage else SMALL
        self.class_heads = nn.ModuleList(class_linear(config.width, num_classes) for _ in heads)
        self.box_heads = nn.ModuleList(box_mlp(config.width, size=0.0 if i else first) for i in heads)
        self.location_heads = nn.ModuleList(location_heads(config) for _ in heads)
        if config.two_stage:
            self.proposal_heads = location_heads(config)
        if config.token_labels:
            channels = TokenClasses.of(num_classes, config.object_channel).channels
            self.token_head = TokenHead(config.width, channels)
            if not config.two_stage:
                self.token_embedding = TokenEmbedding(config.width)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        padded = mask is not None
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        maps = self.fusion(self.backbone(images, mask), mask, padded)
        tokens = self._tokens(maps[-self.config.decoded_maps :], padded)
        queries, proposals, token_labels = self._start(tokens)
        heads = self._per_layer(self.box_heads)
        answers = self.decoder(queries, tokens.x, tokens, heads, self.config.refine)
        *earlier, last = (self._output(i, answer) for i, answer in enumerate(answers))
        extras = last.extras | token_labels
        return replace(last, aux=tuple(earlier), proposals=proposals, extras=extras)

    def _tokens(self, maps: list[Map], padded: bool) -> Tokens:
        """Fused maps as the decoder's memory. Deformable attention does not ask where keys are: no positions for it."""
        if self.config.decoder == "deformable":
            return flatten(maps, [x[:, :0] for x, _ in maps], padded)
        positions = [
            sine_positions(mask, x.shape[1], offset=-0.5).to(x.dtype) + embed.to(x.dtype)[:, None, None]
            for (x, mask), embed in zip(maps, self.level_embed, strict=True)
        ]
        return flatten(maps, positions, padded)

    def _start(self, tokens: Tokens) -> tuple[Queries, Output | None, dict[str, Tensor]]:
        """Queries; and while training, the proposals and the extras of the token labels."""
        learning = self.training
        if not (learning or self.config.keep_proposals):
            return self.queries(tokens.x, tokens)[0], None, {}
        anchors, unusable = token_anchors(tokens)
        proposals = None
        if isinstance(self.queries, ProposedQueries):
            x = self.queries.embed(tokens.x, unusable)
            boxes = (self.queries.box_head(x) + anchors).sigmoid()
            located = self.proposal_heads(x, anchors[..., :2].sigmoid()) if learning else {}
            proposals = Output(self.queries.class_head(x), boxes, extras=located)
            best = self.queries.best(proposals.logits[..., 0], unusable)
            queries = self.queries.start(take(boxes, best), tokens.x.dtype)
        else:
            queries, _ = self.queries(tokens.x, tokens)
            x = self.token_embedding(tokens.x, unusable) if self.config.token_labels else tokens.x
        return queries, proposals, self.token_head(x, tokens) if learning and self.config.token_labels else {}

    def _output(self, layer: int, answer: Answer) -> Output:
        logits = self._per_layer(self.class_heads)[layer](answer.embedding)
        located = self._per_layer(self.location_heads)[layer](answer.embedding, answer.reference[..., :2])
        return Output(logits, answer.boxes, extras=located)

    def _per_layer(self, heads: nn.ModuleList) -> list[nn.Module]:
        """One head for each decoder layer."""
        return list(heads) if self.config.refine else [heads[0]] * self.config.decoder_layers


def build_fusion(config: D2etrConfig, channels: tuple[int, ...]) -> CrossScaleFusion:
    return CrossScaleFusion(
        channels,
        config.width,
        coarser=config.coarser_map,
        blocks=config.fuse_blocks,
        heads=config.heads,
        ffn=config.fuse_ffn,
        pool=config.pool,
        residual=config.ceca_residual,
        drop_path=config.fuse_drop_path,
        masked=config.masked_pooling,
    )


def build_queries(config: D2etrConfig, num_classes: int) -> LearnedQueries | ProposedQueries:
    if not config.two_stage:
        return LearnedQueries(config.num_queries, config.width)
    return ProposedQueries(
        config.num_queries, config.width, num_classes, mask_proposals=config.mask_proposals
    )


def build_decoder(config: D2etrConfig) -> Decoder | DenseDecoder:
    layers, width, heads, ffn = config.decoder_layers, config.width, config.heads, config.ffn
    if config.decoder == "dense":
        return DenseDecoder(layers, width, heads, ffn, config.dropout)
    return Decoder(layers, width, heads, config.decoded_maps, config.points, ffn, config.dropout)


def location_heads(config: D2etrConfig) -> LocationHeads:
    return LocationHeads(config.width, iou=config.iou, centerness=config.centerness)
