"""The set loss of Deformable DETR with location-aware terms, and the loss of the token labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from detrcli.nn.criterion import SetCriterion, count_boxes, stacked, suffixes
from detrcli.nn.matcher import Matches
from detrcli.types import Losses, Output, Target
from detrcli_d2etr.location_aware import LocationAwareLoss
from detrcli_d2etr.token_labels import EXTENT, TokenLabelLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class D2etrCriterion:
    """All decoder layers; then the proposals of all tokens, for which every object is of class 0 (terms with `_enc`); then the
    tokens. What the model does not predict has no term."""

    location: LocationAwareLoss
    tokens: TokenLabelLoss
    weights: Mapping[str, float]  # of the terms that Deformable DETR does not have
    layers: SetCriterion = field(
        default_factory=lambda: SetCriterion(kind="focal", class_cost=2, class_weight=2)
    )

    def __call__(self, output: Output, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        count = count_boxes(targets, output.boxes.device, num_boxes)
        answers = [(output, targets)]
        if output.proposals is not None:
            objects = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
            answers.append((output.proposals, objects))
        with torch.autocast(output.boxes.device.type, enabled=False):
            given = [(*stacked(answer), wanted) for answer, wanted in answers]
            matched = self.layers.matcher.each(given)
            parts = [self._layers(output, *given[0], count, matched[0], suffixes(output))]
            if output.proposals is not None:
                parts.append(self._layers(output.proposals, *given[1], count, matched[1], ["_enc"]))
            if EXTENT in output.extras:
                parts.append(self._weigh(self.tokens(output.extras, targets, count), [""]))
        return together(parts)

    def _layers(
        self,
        output: Output,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        count: Tensor,
        matches: Matches,
        suffixes: Sequence[str],
    ) -> Losses:
        values = self.layers.layer_losses(logits, boxes, targets, count, matches)
        aware = self.location((*output.aux, output), targets, matches, count)
        parts = [self.layers.weigh(values, suffixes)]
        return together([*parts, self._weigh(aware, suffixes)] if aware else parts)

    def _weigh(self, values: Mapping[str, Tensor], suffixes: Sequence[str]) -> Losses:
        """The weighted total of losses, (L,) each or of no axis, and its terms by name."""
        total = torch.stack([self.weights[name] * v.sum() for name, v in values.items()]).sum()
        terms = {
            name + suffix: value
            for name, v in values.items()
            for suffix, value in zip(suffixes, v.detach().reshape(-1), strict=True)
        }
        return Losses(total, terms)


def together(parts: Sequence[Losses]) -> Losses:
    terms = {name: value for part in parts for name, value in part.terms.items()}
    return Losses(torch.stack([part.total for part in parts]).sum(), terms)
