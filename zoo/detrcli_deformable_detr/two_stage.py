"""Where queries come from: learned, or, in the two-stage model, the best proposals of the encoder (appendix A.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrcli.nn.position import sine_boxes
from detrcli.types import Output
from detrcli_deformable_detr.decoder import Queries
from detrcli_deformable_detr.encoder import xavier_linears
from detrcli_deformable_detr.heads import box_mlp, class_linear
from detrcli_deformable_detr.levels import Tokens, token_centres

ANCHOR = 0.05  # side of an anchor in the finest level; it doubles with each coarser one
BORDER = 0.01  # anchors must lie this far inside the picture, and be smaller by twice as much


class LearnedQueries(nn.Module):
    """Content and position are learned; the reference point is linear in the position."""

    def __init__(self, num_queries: int, width: int) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(num_queries, 2 * width)  # position, content
        self.reference_points = nn.Linear(width, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Tensor, tokens: Tokens) -> tuple[Queries, None]:
        position, content = self.query_embed.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)
        reference = self.reference_points(position).to(tokens.sizes.dtype).sigmoid()
        return Queries(content, position, reference), None


class ProposedQueries(nn.Module):
    """Every token of the memory proposes a box around itself; the best, by objectness, become the queries.

    The class head's first channel is the objectness; the released weights carry one channel for each class there.
    """

    def __init__(self, num_queries: int, width: int, channels: int, *, mask_proposals: bool = True) -> None:
        super().__init__()
        self.num_queries, self.mask_proposals = num_queries, mask_proposals
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.pos_trans = nn.Linear(2 * width, 2 * width)
        self.pos_trans_norm = nn.LayerNorm(2 * width)
        xavier_linears(self)
        self.class_head = class_linear(width, channels)
        self.box_head = box_mlp(width, size=0.0)

    def forward(self, memory: Tensor, tokens: Tokens) -> tuple[Queries, Output | None]:
        """memory (B, S, C) -> the queries; and while training, the proposals of all tokens: logits (B, S, K), boxes (B, S, 4)."""
        if not self.training:
            return self.choose(memory, tokens), None
        anchors, unusable = token_anchors(tokens)
        x = self.embed(memory, unusable)
        proposals = Output(self.class_head(x), (self.box_head(x) + anchors).sigmoid())
        best = self.best(proposals.logits[..., 0], unusable)
        return self.start(take(proposals.boxes, best), memory.dtype), proposals

    def choose(self, memory: Tensor, tokens: Tokens) -> Queries:
        """The same queries for less: the objectness of all tokens, and boxes of the best only."""
        anchors, unusable = token_anchors(tokens)
        x = self.embed(memory, unusable)
        objectness = F.linear(x, self.class_head.weight[:1], self.class_head.bias[:1])
        best = self.best(objectness[..., 0], unusable)
        boxes = (self.box_head(take(x, best)) + take(anchors, best)).sigmoid()
        return self.start(boxes, memory.dtype)

    def embed(self, memory: Tensor, unusable: Tensor) -> Tensor:
        """What the heads look at (B, S, C); the same for all unusable tokens."""
        x: Tensor = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable[..., None], 0.0)))
        return x

    def best(self, objectness: Tensor, unusable: Tensor) -> Tensor:
        """The tokens (B, Q) with the highest objectness (B, S); fewer where there are fewer tokens than queries."""
        if self.mask_proposals:
            objectness = objectness.masked_fill(unusable, -torch.inf)
        return objectness.topk(min(self.num_queries, objectness.shape[1]), dim=1).indices

    def start(self, boxes: Tensor, dtype: torch.dtype) -> Queries:
        """Queries at the given boxes (B, Q, 4), which learn nothing from where they are put."""
        reference = boxes.detach()
        embedding = sine_boxes(reference, self.enc_output.in_features // 2).to(dtype)
        position, content = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, -1)
        return Queries(content, position, reference)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows (B, Q, D) of x (B, S, D) at tokens (B, Q)."""
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))


def token_anchors(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Each token's anchor box as logits (B, S, 4), and whether it is unusable (B, S): padding, or at the border.

    Unusable anchors are infinite, so their boxes are constant and no gradient flows through them.
    """
    centre = token_centres(tokens)
    side = torch.cat(
        [centre.new_full((h * w,), ANCHOR * 2**level) for level, (h, w) in enumerate(tokens.shapes)]
    )
    boxes = torch.cat((centre, side[:, None].expand(*centre.shape[:2], 2)), -1)
    unusable = ~((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    if tokens.mask is not None:
        unusable = unusable | tokens.mask
    return (boxes / (1 - boxes)).log().masked_fill(unusable[..., None], torch.inf), unusable
