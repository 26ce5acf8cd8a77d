"""The set prediction loss of DETR (sec. 3.1) and of the deformable models, over all decoder layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detrcli import distributed
from detrcli.boxes import cxcywh_to_xyxy, giou
from detrcli.nn.losses import focal_cost, focal_loss, softmax_cost, softmax_loss
from detrcli.nn.matcher import HungarianMatcher, Matches
from detrcli.types import Losses, Output, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCriterion:
    """Matches every layer's predictions on their own, then sums class, L1 and GIoU losses with their weights.

    `softmax`: K + 1 channels, the last is "no object". `focal`: K channels, each on its own.
    Terms are named as the official code names them: `ce`, `bbox`, `giou` for the last layer, `ce_0` … for earlier ones.
    """

    kind: Literal["softmax", "focal"]
    class_cost: float
    class_weight: float
    box_weight: float = 5.0
    giou_weight: float = 2.0
    no_object: float = 0.1  # softmax only: the weight of "no object" in the cross entropy

    @property
    def matcher(self) -> HungarianMatcher:
        cost = softmax_cost if self.kind == "softmax" else focal_cost
        return HungarianMatcher(
            class_cost=cost,
            class_weight=self.class_cost,
            box_weight=self.box_weight,
            giou_weight=self.giou_weight,
        )

    def __call__(self, output: Output, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        (losses,) = self.each([(output, targets)], num_boxes)
        return losses

    def each(
        self, answers: Sequence[tuple[Output, Sequence[Target]]], num_boxes: float | None = None
    ) -> list[Losses]:
        """The same for several answers to the same pictures, as a decoder's and its proposals': matched in one go."""
        device = answers[0][0].boxes.device
        with torch.autocast(device.type, enabled=False):
            count = count_boxes(answers[0][1], device, num_boxes)
            given = [(*stacked(output), targets) for output, targets in answers]
            matched = zip(answers, given, self.matcher.each(given), strict=True)
            return [
                self.weigh(self.layer_losses(*one, count, matches), suffixes(output))
                for (output, _), one, matches in matched
            ]

    def layer_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        num_boxes: Tensor,
        matches: Matches,
    ) -> dict[str, Tensor]:
        """Unweighted losses, (L,) each, of logits (L, B, Q, K) and boxes (L, B, Q, 4) that were matched.

        `num_boxes` is `count_boxes`.
        """
        shares = divisor(num_boxes)
        labels = torch.cat([t.labels for t in targets])[matches.target]
        wanted = torch.cat([t.boxes for t in targets])[matches.target].to(boxes.dtype)
        guess = boxes[matches.places]  # (N, 4)
        per_layer = boxes.new_zeros(len(boxes))
        l1 = per_layer.index_add(0, matches.places[0], (guess - wanted).abs().sum(-1))
        overlap = giou(cxcywh_to_xyxy(guess), cxcywh_to_xyxy(wanted))
        return {
            "ce": self._class_loss(logits, matches, labels, num_boxes),
            "bbox": l1 / shares,
            "giou": per_layer.index_add(0, matches.places[0], 1 - overlap) / shares,
        }

    def weigh(self, values: dict[str, Tensor], suffixes: Sequence[str]) -> Losses:
        """The weighted total of per-layer losses, and its terms by name."""
        weights = {"ce": self.class_weight, "bbox": self.box_weight, "giou": self.giou_weight}
        total = torch.stack([weights[name] * value.sum() for name, value in values.items()]).sum()
        terms = {
            name + suffix: value.detach()[i]
            for name, value in values.items()
            for i, suffix in enumerate(suffixes)
        }
        return Losses(total, terms)

    def _class_loss(self, logits: Tensor, matches: Matches, labels: Tensor, num_boxes: Tensor) -> Tensor:
        if self.kind == "softmax":
            return softmax_loss(logits, matches.places, labels, num_boxes, self.no_object)
        return focal_loss(logits, matches.places, labels) / divisor(num_boxes)


def stacked(output: Output) -> tuple[Tensor, Tensor]:
    """Logits (L, B, Q, K) and boxes (L, B, Q, 4) of all layers, the last one last."""
    layers = (*output.aux, output)
    return (
        at_least_float32(torch.stack([layer.logits for layer in layers])),
        at_least_float32(torch.stack([layer.boxes for layer in layers])),
    )


def suffixes(output: Output) -> list[str]:
    """Of the names of the terms of all layers."""
    return [*(f"_{i}" for i in range(len(output.aux))), ""]


def count_boxes(targets: Sequence[Target], device: torch.device, given: float | None = None) -> Tensor:
    """How many objects a backward pass stands for: given, or the mean over ranks of this batch's, which may be none."""
    count = sum(len(t.labels) for t in targets)
    return (
        distributed.mean_over_ranks(count, device)
        if given is None
        else torch.tensor(float(given)).to(device, non_blocking=True)
    )


def divisor(num_boxes: Tensor) -> Tensor:
    """What sums over objects are divided by: their number, or 1 where there are none. Less than 1 is right where a batch with few
    objects is taken in parts: each has its share of them."""
    return torch.where(num_boxes > 0, num_boxes, 1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision predictions as float32; losses and geometry are never computed in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
