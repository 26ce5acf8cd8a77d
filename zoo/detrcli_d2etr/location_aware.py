"""Location-aware prediction (sec. 3.4 of the paper): how good a box is, besides what it holds.

score = class^p * IoU^alpha * centerness^beta
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy, iou
from detrcli.nn.criterion import at_least_float32, divisor
from detrcli.nn.layers import MLP
from detrcli.nn.matcher import Matches
from detrcli.types import Output, Target

IOU, CENTERNESS, REFERENCE = "iou", "centerness", "reference"  # in Output.extras: (B, Q), (B, Q), (B, Q, 2)


class LocationHeads(nn.ModuleDict):
    """Logits of the IoU and of the centerness of answers, each from a head of its own where it is wanted."""

    def __init__(self, width: int, *, iou: bool, centerness: bool) -> None:
        wanted = ((IOU, iou), (CENTERNESS, centerness))
        super().__init__({name: MLP(width, width, 1, 3) for name, on in wanted if on})

    def forward(self, x: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """x (B, Q, C) that was answered from reference points (B, Q, 2) -> extras of an Output."""
        return {name: head(x)[..., 0] for name, head in self.items()} | {REFERENCE: reference}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocationAwareLoss:
    """Binary cross entropies of the predicted IoU and centerness of matched queries, for all layers at once."""

    detach_iou_target: bool
    centerness_of_box: bool

    def __call__(
        self, layers: Sequence[Output], targets: Sequence[Target], matches: Matches, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted losses, (L,) each, of the heads that there are."""
        boxes = _stack([layer.boxes for layer in layers])[matches.places]  # (N, 4)
        wanted = torch.cat([t.boxes for t in targets])[matches.target].to(boxes.dtype)
        losses: dict[str, Tensor] = {}
        if CENTERNESS in layers[0].extras:
            guess = _stack([layer.extras[CENTERNESS] for layer in layers])[matches.places]
            points = boxes.detach()[:, :2] if self.centerness_of_box else self._references(layers, matches)
            losses["center"] = centerness_losses(guess, points, wanted)
        if IOU in layers[0].extras:
            guess = _stack([layer.extras[IOU] for layer in layers])[matches.places]
            losses["iouaware"] = iou_losses(
                guess, boxes.detach() if self.detach_iou_target else boxes, wanted
            )
        per_layer = boxes.new_zeros(len(layers))
        return {
            name: per_layer.index_add(0, matches.places[0], value) / divisor(num_boxes)
            for name, value in losses.items()
        }

    def _references(self, layers: Sequence[Output], matches: Matches) -> Tensor:
        """(N, 2)"""
        references = _stack([layer.extras[REFERENCE] for layer in layers])
        return references.detach()[matches.places]


def iou_losses(guess: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of logits (N,) with the overlap of boxes (N, 4) and wanted boxes (N, 4), cxcywh."""
    overlap, _ = iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return cross_entropy(guess, overlap)


def centerness_losses(guess: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of logits (N,) with the centerness of points (N, 2) in wanted boxes (N, 4); 0 outside of them."""
    corners = cxcywh_to_xyxy(wanted)
    low, high = corners[:, :2], corners[:, 2:]
    before, after = points - low, high - points  # (N, 2): left and top, right and bottom
    inside = torch.minimum(before, after).amin(-1) > 0
    share = torch.minimum(before, after) / torch.maximum(before, after)
    centerness = torch.where(inside[:, None], share, 0).prod(-1).sqrt()
    return torch.where(inside, cross_entropy(guess, centerness), 0)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary, elementwise, of soft targets; differentiable in both."""
    return F.softplus(logits) - logits * wanted


def location_aware_scores(output: Output, class_power: float, alpha: float, beta: float) -> Tensor:
    """(B, Q, K); a head that is not there counts as sure."""
    log_score = class_power * F.logsigmoid(output.logits.float())
    for name, power in ((IOU, alpha), (CENTERNESS, beta)):
        if name in output.extras:
            log_score = log_score + power * F.logsigmoid(output.extras[name].float())[..., None]
    return log_score.exp()


def _stack(values: Sequence[Tensor]) -> Tensor:
    return at_least_float32(torch.stack(tuple(values)))
