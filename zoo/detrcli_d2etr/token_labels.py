"""Token labelling (sec. 3.5 of the paper): every token of the decoded maps learns which objects cover it, and how much.

Labels are soft: instance masks, where several overlap the one that is annotated first, averaged over each token's cell. One
channel stands for any object. COCO's raw category ids leave channel 0 free for it; contiguous classes do not, so there it is
one more channel behind them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy
from detrcli.nn.criterion import at_least_float32, divisor
from detrcli.nn.losses import ALPHA, GAMMA
from detrcli.plugins.contract import COCO_CLASSES
from detrcli.types import Target
from detrcli_deformable_detr.encoder import xavier_linears
from detrcli_deformable_detr.heads import class_linear
from detrcli_deformable_detr.levels import Tokens

logger = logging.getLogger("detrcli.d2etr")

TOKENS, EXTENT = (
    "tokens",
    "extent",
)  # in Output.extras: (B, K, H, W) a map, numbered; (B, 2) unpadded share of width, height
CELL = 8  # without masks, boxes are drawn this many times finer than the finest map

ObjectChannel = Literal["auto", "first", "last"]


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """Which channel stands for what."""

    channels: int
    any_object: int

    @classmethod
    def of(cls, num_classes: int, place: ObjectChannel) -> TokenClasses:
        if place == "first" or (place == "auto" and num_classes == COCO_CLASSES):
            return cls(num_classes, 0)
        return cls(num_classes + 1, num_classes)


class TokenEmbedding(nn.Module):
    """What a token head looks at, where no proposals do the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        xavier_linears(self)

    def forward(self, memory: Tensor, unusable: Tensor) -> Tensor:
        """memory (B, S, C), tokens that are padding or at the border (B, S) -> (B, S, C)."""
        x: Tensor = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable[..., None], 0.0)))
        return x


class TokenHead(nn.Module):
    """(B, S, C) -> logits (B, channels, H, W) of every map."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.token_embed = class_linear(width, channels)

    def forward(self, x: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        maps = self.token_embed(x).mT.split([h * w for h, w in tokens.shapes], -1)
        logits = {
            f"{TOKENS}_{i}": part.unflatten(-1, size)
            for i, (part, size) in enumerate(zip(maps, tokens.shapes, strict=True))
        }
        return logits | {EXTENT: tokens.ratios[:, 0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLabelLoss:
    """Focal and dice loss of every map against its soft labels."""

    any_object: int

    def __call__(
        self, extras: dict[str, Tensor], targets: Sequence[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted; each map counts alike, whatever its size."""
        names = [name for name in extras if name.startswith(TOKENS)]
        maps = [at_least_float32(extras[name]) for name in names]
        labels = token_labels(maps, targets, extras[EXTENT], self.any_object)
        focal = [soft_focal_loss(x, y).flatten(2).mean(-1).sum() for x, y in zip(maps, labels, strict=True)]
        dice = [dice_loss(x, y).sum() for x, y in zip(maps, labels, strict=True)]
        count = divisor(num_boxes)
        return {"token_focal": sum_of(focal) / count, "token_dice": sum_of(dice) / count}


def sum_of(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(values)).sum()


def soft_focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sigmoid focal loss of soft labels, elementwise."""
    p = logits.sigmoid()
    missed = p * (1 - wanted) + (1 - p) * wanted
    weight = ALPHA * wanted + (1 - ALPHA) * (1 - wanted)
    return weight * missed**GAMMA * (F.softplus(logits) - logits * wanted)


def dice_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 less the smoothed overlap of all channels and tokens of a picture; (B, K, H, W) -> (B,)."""
    p, wanted = logits.sigmoid().flatten(1), wanted.flatten(1)
    return 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)


@torch.no_grad()
def token_labels(
    maps: Sequence[Tensor], targets: Sequence[Target], extent: Tensor, any_object: int
) -> list[Tensor]:
    """Soft labels of maps (B, K, H, W), finest first; extent (B, 2) is the unpadded share of their width and height."""
    fine_h, fine_w = maps[0].shape[2:]
    canvas = _canvas(targets, (fine_h * CELL, fine_w * CELL))
    labels = [torch.zeros_like(x) for x in maps]
    for i, target in enumerate(targets):
        masks = target.extras.get("masks")
        if masks is None:
            _tell_of_boxes()
            masks = box_masks(target.boxes, extent[i], canvas)
        seen = _painted(masks.bool(), canvas).to(labels[0].dtype)
        for label in labels:
            cover = F.adaptive_avg_pool2d(seen, (label.shape[2], label.shape[3]))
            label[i].index_add_(0, target.labels, cover)
            label[i, any_object] = cover.sum(0)
    return labels


@functools.cache
def _tell_of_boxes() -> None:
    logger.warning(
        "targets carry no masks: token labels are made of boxes; to do without them set model.token_labels=false"
    )


def _canvas(targets: Sequence[Target], drawn: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the padded batch, which the masks of a batch fill together; `drawn` where there are none."""
    sizes = [t.extras["masks"].shape[1:] for t in targets if "masks" in t.extras]
    return (max(h for h, _ in sizes), max(w for _, w in sizes)) if sizes else drawn


def _painted(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Where each object of an image is seen (T, H, W); masks (T, h, w), the first one on top.

    No place shows two of them, so what a class covers is the sum over its objects: the classes of an image need not be listed,
    which would make a GPU's host wait for their number.
    """
    picture = torch.full(canvas, -1, device=masks.device)
    inner = picture[: masks.shape[1], : masks.shape[2]]
    for number in reversed(range(len(masks))):
        inner.masked_fill_(masks[number], number)
    return picture == torch.arange(len(masks), device=masks.device)[:, None, None]


def box_masks(boxes: Tensor, extent: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Boxes (T, 4) cxcywh of the unpadded picture, filled, on a canvas of the padded one; (T, H, W) bool."""
    height, width = canvas
    x1, y1, x2, y2 = (cxcywh_to_xyxy(boxes) * extent.repeat(2)).unbind(-1)
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    rows = (y >= y1[:, None]) & (y < y2[:, None])
    columns = (x >= x1[:, None]) & (x < x2[:, None])
    return rows[:, :, None] & columns[:, None, :]
