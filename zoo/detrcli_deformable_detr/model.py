"""Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159): DETR that attends to a few sampled points in several feature levels.

tokens  = levels of backbone(image);  memory = encoder(tokens)
queries = learned, or the memory's best proposals (two-stage)
answers = decoder(queries, memory);  class = Linear(answer),  box = reference moved by MLP(answer)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import Backbone
from detrcli.types import Output
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_deformable_detr.decoder import Decoder
from detrcli_deformable_detr.encoder import Encoder
from detrcli_deformable_detr.heads import box_mlp, class_linear
from detrcli_deformable_detr.levels import Levels, Tokens
from detrcli_deformable_detr.two_stage import LearnedQueries, ProposedQueries

SMALL = -2.0  # learned queries start with boxes of sigmoid(-2) = 12 % of the picture


class DeformableDetr(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) -> logits (B, Q, K), each class on its own, and boxes (B, Q, 4).

    `encoder` (Tokens -> memory (B, S, C)) takes the place of the paper's, for papers that change nothing else.
    """

    def __init__(
        self, config: DeformableDetrConfig, num_classes: int, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        blocks = (config.width, config.heads, config.levels, config.points, config.ffn, config.dropout)
        self.backbone = Backbone(config.backbone)
        self.levels = Levels(self.backbone.channels, config.width, config.levels)
        self.encoder = encoder or Encoder(config.encoder_layers, *blocks)
        self.queries = build_queries(config, num_classes)
        self.decoder = Decoder(config.decoder_layers, *blocks)
        # without refinement all layers answer through the same heads
        heads = config.decoder_layers if config.refine else 1
        self.class_heads = nn.ModuleList(class_linear(config.width, num_classes) for _ in range(heads))
        first = 0.0 if config.two_stage else SMALL
        self.box_heads = nn.ModuleList(
            box_mlp(config.width, size=first if i == 0 else 0.0) for i in range(heads)
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        padded = mask is not None
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        return self.answer(self.levels(self.backbone(images, mask), padded))

    def answer(self, tokens: Tokens) -> Output:
        """The transformer and its heads, on the tokens of all levels."""
        memory = self.encoder(tokens)
        queries, proposals = self.queries(memory, tokens)
        answers = self.decoder(queries, memory, tokens, self.per_layer(self.box_heads), self.config.refine)
        *earlier, last = (
            Output(head(answer.embedding), answer.boxes)
            for head, answer in zip(self.per_layer(self.class_heads), answers, strict=True)
        )
        return Output(last.logits, last.boxes, aux=tuple(earlier), proposals=proposals)

    def per_layer(self, heads: nn.ModuleList) -> list[nn.Module]:
        """One head for each decoder layer."""
        return list(heads) if self.config.refine else [heads[0]] * self.config.decoder_layers


def build_queries(config: DeformableDetrConfig, num_classes: int) -> LearnedQueries | ProposedQueries:
    if not config.two_stage:
        return LearnedQueries(config.num_queries, config.width)
    channels = num_classes if config.proposal_channels is None else config.proposal_channels
    return ProposedQueries(config.num_queries, config.width, channels, mask_proposals=config.mask_proposals)
