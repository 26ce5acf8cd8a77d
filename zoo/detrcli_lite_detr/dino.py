"""DINO (Zhang et al., ICLR 2023, arXiv 2203.03605), the host of Lite-DINO, with any encoder and any deformable attention.

Mixed query selection: boxes come from the memory's best proposals, contents are learned. Look forward twice: the box a layer
reports is moved from the box of the layer before with its gradient, so each layer also learns from the next one's loss.
Contrastive denoising: see `denoising`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrcli.nn.backbone import Backbone
from detrcli.nn.dropout import Dropout
from detrcli.nn.layers import MLP
from detrcli.nn.position import sine_boxes
from detrcli.ops import Shapes
from detrcli.types import Output, Target
from detrcli_deformable_detr.decoder import move_boxes
from detrcli_deformable_detr.heads import box_mlp, class_linear
from detrcli_deformable_detr.levels import Levels, Tokens, in_levels
from detrcli_deformable_detr.two_stage import token_anchors
from detrcli_detr.transformer import Attention, FeedForward
from detrcli_lite_detr.config import DinoConfig
from detrcli_lite_detr.denoising import EPS, DenoisingQueries, who_sees_whom
from detrcli_lite_detr.kda import start

TEMPERATURE = 20.0  # of the positions of tokens; those of boxes keep the usual one


class Queries(NamedTuple):
    content: Tensor  # (B, Q, C)
    boxes: Tensor  # (B, Q, 4) cxcywh in [0, 1] of the unpadded picture


class MixedQueries(nn.Module):
    """The boxes of the best proposals, best first, and a learned content for each rank."""

    def __init__(self, num_queries: int, width: int, classes: int) -> None:
        super().__init__()
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        start(self)
        self.class_head = class_linear(width, classes)
        self.box_head = box_mlp(width, size=0.0)
        self.content = nn.Embedding(num_queries, width)

    def forward(self, memory: Tensor, tokens: Tokens) -> tuple[Queries, Output]:
        """memory (B, S, C) -> the queries, and the proposals they come from, logits (B, Q, K) and boxes (B, Q, 4).

        There are fewer queries where the picture has fewer tokens.
        """
        anchors, unusable = token_anchors(tokens)
        x = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable[..., None], 0.0)))
        logits = self.class_head(x)
        score = logits.amax(-1).masked_fill(unusable, -torch.inf)
        best = score.topk(min(self.content.num_embeddings, score.shape[1]), dim=1).indices[..., None]
        x, logits, anchors = (v.gather(1, best.expand(-1, -1, v.shape[-1])) for v in (x, logits, anchors))
        proposals = Output(logits, (self.box_head(x) + anchors).sigmoid())
        content = self.content.weight[: best.shape[1]].expand(memory.shape[0], -1, -1)
        return Queries(content, proposals.boxes.detach()), proposals


class DecoderLayer(nn.Module):
    """x = norm1(x + SelfAttention); x = norm2(x + attention into memory); x = norm3(x + FFN(x))."""

    def __init__(self, attention: nn.Module, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = attention
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
        hidden: Tensor | None,
    ) -> Tensor:
        """x and position (B, Q, C), reference (B, Q, L, 4), memory (B, S, C), mask (B, S), hidden (Q, Q) -> (B, Q, C)."""
        query = x + position
        looked = self.self_attn(query, query, x, attn_mask=hidden, need_weights=False)[0]
        x = self.norm1(x + self.dropout(looked))
        x = self.norm2(x + self.dropout(self.cross_attn(x + position, reference, memory, shapes, mask)))
        x = self.norm3(x + self.dropout(self.ffn(x)))
        return x


class Decoder(nn.Module):
    """Positions of queries are made of their boxes, anew in each layer."""

    def __init__(self, config: DinoConfig, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        width = config.width
        self.layers = nn.ModuleList(
            DecoderLayer(attention(), width, config.heads, config.ffn, config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.ref_point_head = MLP(2 * width, width, width, 2)
        self.norm = nn.LayerNorm(width)
        start(self)

    def forward(
        self, queries: Queries, memory: Tensor, tokens: Tokens, box_head: nn.Module, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (L, B, Q, C) and boxes (L, B, Q, 4) of every layer; hidden (Q, Q), True where queries are not to look."""
        x, boxes = queries
        before, embeddings, reported = boxes, [], []
        for layer in self.layers:
            reference = in_levels(boxes, tokens.ratios)
            position = self.position(reference[:, :, 0], x.dtype)
            x = layer(x, position, reference, memory, tokens.shapes, tokens.mask, hidden)
            embeddings.append(self.norm(x))
            reported.append(move_boxes(box_head(embeddings[-1]), before, EPS))
            before = move_boxes(box_head(x), boxes, EPS)
            boxes = before.detach()
        return torch.stack(embeddings), torch.stack(reported)

    def position(self, boxes: Tensor, dtype: torch.dtype) -> Tensor:
        """boxes (B, Q, 4) in the finest level -> (B, Q, C) in `dtype`."""
        y_first = torch.cat((boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]), -1)
        sines = sine_boxes(y_first, self.norm.normalized_shape[0] // 2)
        encoded: Tensor = self.ref_point_head(sines.to(dtype))
        return encoded.to(dtype)


class Dino(nn.Module):
    """images (B, 3, H, W), mask (B, H, W) -> logits (B, Q, K), each class on its own, and boxes (B, Q, 4).

    With targets there are denoising queries too; their answers are `denoised_logits` (L, B, D, K) and `denoised_boxes`
    (L, B, D, 4) among the output's extras.
    """

    def __init__(
        self,
        config: DinoConfig,
        num_classes: int,
        encoder: nn.Module,
        attention: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.backbone = Backbone(config.backbone)
        self.levels = Levels(
            self.backbone.channels, width, config.levels, offset=0.0, temperature=TEMPERATURE
        )
        self.encoder = encoder
        self.queries = MixedQueries(config.num_queries, width, num_classes)
        self.denoising = build_denoising(config, num_classes)
        self.decoder = Decoder(config, attention)
        self.class_head = class_linear(width, num_classes)
        self.box_head = box_mlp(width, size=0.0)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, targets: Sequence[Target] | None = None
    ) -> Output:
        padded = mask is not None
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        return self.answer(self.levels(self.backbone(images, mask), padded), targets)

    def answer(self, tokens: Tokens, targets: Sequence[Target] | None = None) -> Output:
        """The transformer and its heads, on the tokens of all levels."""
        memory = self.encoder(tokens)
        queries, proposals = self.queries(memory, tokens)
        hidden, noisy = None, 0
        if self.denoising is not None and targets is not None:
            queries, hidden, noisy = self.with_noise(queries, targets)
        embeddings, boxes = self.decoder(queries, memory, tokens, self.box_head, hidden)
        logits = self.class_head(embeddings)
        *earlier, last = (
            Output(*pair) for pair in zip(logits[:, :, noisy:], boxes[:, :, noisy:], strict=True)
        )
        extras = {"denoised_logits": logits[:, :, :noisy], "denoised_boxes": boxes[:, :, :noisy]}
        return Output(
            last.logits, last.boxes, tuple(earlier), proposals, extras if hidden is not None else {}
        )

    def with_noise(self, queries: Queries, targets: Sequence[Target]) -> tuple[Queries, Tensor, int]:
        """Denoising queries before the model's own, who may not look at whom, and how many there are."""
        assert self.denoising is not None
        noisy = self.denoising(targets)
        content = torch.cat((noisy.content.to(queries.content.dtype), queries.content), 1)
        boxes = torch.cat((noisy.boxes.sigmoid().to(queries.boxes.dtype), queries.boxes), 1)
        group = 2 * max(len(t.labels) for t in targets)
        count = noisy.boxes.shape[1]
        return (
            Queries(content, boxes),
            who_sees_whom(count, group, queries.boxes.shape[1], boxes.device),
            count,
        )


def build_denoising(config: DinoConfig, num_classes: int) -> DenoisingQueries | None:
    if config.denoising == 0:
        return None
    return DenoisingQueries(
        num_classes,
        config.width,
        config.denoising,
        label_noise=config.label_noise,
        box_noise=config.box_noise,
    )
