"""The focal set loss of Deformable DETR, with the proposals of the two-stage model as one more layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from detrcli.nn.criterion import SetCriterion
from detrcli.types import Losses, Output, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DeformableCriterion:
    """All decoder layers; then the proposals of all tokens, for which every object is of class 0 (terms with `_enc`)."""

    layers: SetCriterion = field(
        default_factory=lambda: SetCriterion(kind="focal", class_cost=2, class_weight=2)
    )

    def __call__(self, output: Output, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        if output.proposals is None:
            return self.layers(output, targets, num_boxes)
        objects = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
        losses, proposed = self.layers.each([(output, targets), (output.proposals, objects)], num_boxes)
        terms = {f"{name}_enc": value for name, value in proposed.terms.items()}
        return Losses(losses.total + proposed.total, losses.terms | terms)
