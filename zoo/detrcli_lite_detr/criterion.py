"""The loss of DINO: the focal set loss of all layers, of the proposals the queries come from, and of the denoising queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detrcli.nn.criterion import SetCriterion, at_least_float32, count_boxes, divisor
from detrcli.nn.matcher import Matches
from detrcli.types import Losses, Output, Target
from detrcli_lite_detr.denoising import query_places


@dataclass(frozen=True, slots=True, kw_only=True)
class DinoCriterion:
    """Terms of the proposals end with `_interm`, those of the denoising queries contain `_dn`."""

    layers: SetCriterion = field(
        default_factory=lambda: SetCriterion(kind="focal", class_cost=2, class_weight=1)
    )

    def __call__(self, output: Output, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        answers = [answer for answer in (output, output.proposals) if answer is not None]
        decoded, *proposed = self.layers.each([(answer, targets) for answer in answers], num_boxes)
        renamed = [{f"{name}_interm": value for name, value in part.terms.items()} for part in proposed]
        parts = [decoded, *(Losses(part.total, terms) for part, terms in zip(proposed, renamed, strict=True))]
        if output.extras:
            parts.append(self.denoised(output.extras, targets, num_boxes))
        total = torch.stack([part.total for part in parts]).sum()
        return Losses(total, {name: value for part in parts for name, value in part.terms.items()})

    def denoised(
        self, extras: dict[str, Tensor], targets: Sequence[Target], num_boxes: float | None
    ) -> Losses:
        """A positive query belongs to its object; a negative one, and a place without an object, to none."""
        logits, boxes = (at_least_float32(extras[f"denoised_{what}"]) for what in ("logits", "boxes"))
        most = max(len(t.labels) for t in targets)
        groups = boxes.shape[2] // (2 * most) if most else 1
        count = divisor(count_boxes(targets, boxes.device, num_boxes)) * groups
        matches = positives(targets, len(boxes), groups, most)
        with torch.autocast(boxes.device.type, enabled=False):
            values = self.layers.layer_losses(logits, boxes, targets, count, matches)
        return self.layers.weigh(values, [*(f"_dn_{i}" for i in range(len(boxes) - 1)), "_dn"])


def positives(targets: Sequence[Target], layers: int, groups: int, most: int) -> Matches:
    """Which denoising query, in every layer, is made of which object, moved a little."""
    picture, query = (place[::2] for place in query_places(targets, 2 * groups, most))  # (groups, N)
    objects = torch.arange(query.shape[1], device=query.device).expand_as(query)
    layer = torch.arange(layers, device=query.device).repeat_interleave(query.numel())
    again = [place.flatten().repeat(layers) for place in (picture, query, objects)]
    return Matches((layer, again[0], again[1]), again[2])
