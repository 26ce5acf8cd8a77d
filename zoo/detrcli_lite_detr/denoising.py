"""Contrastive denoising of DINO (sec. 3.3 of arXiv 2203.03605): queries made of the objects themselves, to be put right again.

Every object is repeated in groups; in each there is a positive query, whose box is moved by less than half its size and must
find back, and a negative one, moved further, which must answer "nothing". Some labels are drawn anew. Groups do not see each
other, and the model's own queries see none of them.

Order of the queries of a picture, T being the most objects of any picture of the batch:

    group 0: T positives, T negatives;  group 1: T positives, T negatives; …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrcli.nn.layers import inverse_sigmoid
from detrcli.types import Target

EPS = 1e-3  # DINO keeps boxes this far from 0 and 1 wherever it takes their logits


class Draws(NamedTuple):
    """What is random: R = 2 * groups repetitions (positive, negative, positive, …) of the N objects of a batch."""

    flip: Tensor  # (R, N) in [0, 1): labels are replaced where it is small
    label: Tensor  # (R, N) what they are replaced by
    sign: Tensor  # (R, N, 4) -1 or 1: where each corner coordinate moves
    share: Tensor  # (R, N, 4) in [0, 1): how far


class Noisy(NamedTuple):
    """Denoising queries of a batch."""

    content: Tensor  # (B, D, C)
    boxes: Tensor  # (B, D, 4) cxcywh as logits; zeros in places without an object


def count_groups(setting: int, most: int) -> int:
    """How many groups for `setting` when the fullest picture has `most` objects: as many as fill `setting` positive queries.

    Below 50, the official code takes twice the setting as the number of groups, however many objects there are.
    """
    if most == 0:
        return 1
    return max(1, setting // most) if setting >= 50 else 2 * setting


def draw(groups: int, objects: int, classes: int, device: torch.device) -> Draws:
    rows = (2 * groups, objects)
    return Draws(
        torch.rand(rows, device=device),
        torch.randint(classes, rows, device=device),
        torch.randint(2, (*rows, 4), device=device) * 2 - 1,
        torch.rand((*rows, 4), device=device),
    )


class DenoisingQueries(nn.Module):
    """Noisy objects as queries; the content of a query is the embedding of its label."""

    def __init__(
        self, classes: int, width: int, setting: int, *, label_noise: float, box_noise: float
    ) -> None:
        super().__init__()
        self.classes, self.setting = classes, setting
        self.label_noise, self.box_noise = label_noise, box_noise
        self.label_enc = nn.Embedding(
            classes + 1, width
        )  # the last row is never used; released weights have it

    def forward(self, targets: Sequence[Target], draws: Draws | None = None) -> Noisy:
        most = max(len(t.labels) for t in targets)
        labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
        groups = count_groups(self.setting, most)
        draws = draws or draw(groups, len(labels), self.classes, boxes.device)
        content = self.label_enc(torch.where(draws.flip < self.label_noise / 2, draws.label, labels))
        logits = inverse_sigmoid(self.moved(boxes, draws), EPS)
        places = query_places(targets, len(draws.flip), most)
        size = (len(targets), len(draws.flip) * most)
        return Noisy(
            content.new_zeros(*size, content.shape[-1]).index_put(places, content),
            logits.new_zeros(*size, 4).index_put(places, logits),
        )

    def moved(self, boxes: Tensor, draws: Draws) -> Tensor:
        """boxes (N, 4) with their corners moved, by less than half the box's size in even rows, by more in odd ones: (R, N, 4)."""
        share = draws.share + (torch.arange(len(draws.share), device=boxes.device) % 2)[:, None, None]
        half = (boxes[:, 2:] / 2).repeat(1, 2)
        corners = cxcywh_to_xyxy(boxes) + draws.sign * share * half * self.box_noise
        return xyxy_to_cxcywh(corners.clamp(0, 1))


def query_places(targets: Sequence[Target], repetitions: int, most: int) -> tuple[Tensor, Tensor]:
    """Picture and query of each repetition of each object, (R, N) both."""
    device = targets[0].labels.device
    places = [(image, i) for image, target in enumerate(targets) for i in range(len(target.labels))]
    picture, within = (
        torch.tensor(places).reshape(-1, 2).to(device, torch.int64, non_blocking=True).unbind(-1)
    )
    query = torch.arange(repetitions, device=device)[:, None] * most + within
    return picture.expand_as(query), query


def who_sees_whom(denoising: int, group: int, queries: int, device: torch.device) -> Tensor:
    """(D + Q, D + Q), True where attention is forbidden: between groups, and from the model's own queries to any of them."""
    owner = torch.full((denoising + queries,), -1, device=device)
    if group:
        owner[:denoising] = torch.arange(denoising, device=device) // group
    return (owner != owner[:, None]) & (owner >= 0)
