"""Hungarian matching of predictions to objects, for all prediction layers and images of a batch at once.

Costs are computed only against an image's own objects and cross to the host in one copy; scipy solves each (layer, image) there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detrcli.boxes import cxcywh_to_xyxy, giou
from detrcli.errors import NonFiniteError
from detrcli.nn.losses import Places
from detrcli.types import Target

logger = logging.getLogger(__name__)

ClassCost = Callable[[Tensor, Tensor], Tensor]  # logits (L, B, Q, K), labels (B, T) -> (L, B, T, Q)


@dataclass(frozen=True, slots=True)
class Matches:
    """Matched pairs of all layers, flat. `target` counts through the objects of the whole batch, image after image."""

    places: Places  # layer, image, query; (N,) each
    target: Tensor  # (N,)


@dataclass(frozen=True, slots=True, kw_only=True)
class HungarianMatcher:
    """Minimises class_weight * class cost + box_weight * L1 + giou_weight * (-GIoU), one object to one query.

    With more objects than queries, each query gets an object and the rest stay unmatched.
    """

    class_cost: ClassCost
    class_weight: float
    box_weight: float = 5.0
    giou_weight: float = 2.0

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
        """(L, B, T, Q) with T the largest object count; rows past an image's own count mean nothing."""
        labels = pad_sequence([t.labels for t in targets], batch_first=True)  # (B, T)
        wanted = pad_sequence([t.boxes for t in targets], batch_first=True).to(boxes.dtype)[None, :, :, None]
        guess = boxes[:, :, None]  # (L, B, 1, Q, 4)
        l1 = (guess - wanted).abs().sum(-1)
        overlap = giou(cxcywh_to_xyxy(guess), cxcywh_to_xyxy(wanted))
        return (
            self.class_weight * self.class_cost(logits, labels)
            + self.box_weight * l1
            - self.giou_weight * overlap
        )

    def __call__(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Matches:
        """logits (L, B, Q, K) and boxes (L, B, Q, 4), cxcywh; one Target an image."""
        (matches,) = self.each([(logits, boxes, targets)])
        return matches

    def each(self, answers: Sequence[tuple[Tensor, Tensor, Sequence[Target]]]) -> list[Matches]:
        """The same for several answers at once, as a decoder's and its proposals': their costs travel together."""
        costs = [self.cost(*answer) for answer in answers]
        flat = _on_host(torch.cat([cost.flatten() for cost in costs]))
        ends = np.cumsum([cost.numel() for cost in costs])
        parts = zip(np.split(flat, ends[:-1]), costs, answers, strict=True)
        solved = [_solved(part.reshape(cost.shape), targets) for part, cost, (_, _, targets) in parts]
        pairs = torch.from_numpy(np.concatenate(solved, axis=1)).to(costs[0].device, non_blocking=True)
        bounds = np.cumsum([0, *(part.shape[1] for part in solved)]).tolist()
        cuts = [pairs[:, start:end].unbind() for start, end in pairwise(bounds)]
        return [Matches((layer, image, query), target) for layer, image, query, target in cuts]


def _on_host(values: Tensor) -> np.ndarray:
    """The one place of a step where the host waits for the device, but for the numbers to show."""
    return values.cpu().numpy()


def _solved(cost: np.ndarray, targets: Sequence[Target]) -> np.ndarray:
    """Layer, image, query and target of every pair, (4, N); cost (L, B, T, Q)."""
    counts = [len(t.labels) for t in targets]
    if max(counts) > cost.shape[3] > 0:
        _note_more_objects(cost.shape[3])
    first = np.cumsum([0, *counts])
    pairs = [
        (layer, image, *_solve(cost[layer, image, :count], layer, image), first[image])
        for layer in range(len(cost))
        for image, count in enumerate(counts)
        if count
    ]
    columns = [
        np.stack((np.full_like(query, layer), np.full_like(query, image), query, own + start))
        for layer, image, own, query, start in pairs
    ]
    return np.concatenate([np.zeros((4, 0), np.int64), *columns], axis=1)


@functools.cache
def _note_more_objects(queries: int) -> None:
    """Said once: it is the data's nature, and training goes on."""
    logger.warning(
        "some pictures have more objects than the model's %d queries: the surplus is not learnt from "
        "(more queries: --set model.num_queries=N)",
        queries,
    )


def _solve(cost: np.ndarray, layer: int, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Objects and their queries for one image; cost (T, Q)."""
    try:
        own, query = linear_sum_assignment(cost)
    except ValueError as error:  # scipy refuses NaN
        raise NonFiniteError(
            f"predictions of layer {layer} for picture {image} of the batch are not finite, nothing can be matched",
            hint="lower the learning rate, or train in float32 (--amp off)",
        ) from error
    return own, query
