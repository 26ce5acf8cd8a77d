"""From a model's answer to detections in the pixels of the original picture."""

from __future__ import annotations

import torch
from torch import Tensor

from detrcli.boxes import cxcywh_to_xyxy
from detrcli.types import Detections, Output


def softmax_best(output: Output, sizes: Tensor) -> list[Detections]:
    """DETR: each query's best class other than "no object", one detection a query, best first. `sizes` (B, 2): height, width."""
    scores, labels = output.logits.float().softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    boxes = _pixels(output.boxes, sizes)
    return [
        Detections(score, label[i], box[i])
        for score, label, box, i in zip(scores, labels, boxes, order, strict=True)
    ]


def sigmoid_topk(output: Output, sizes: Tensor, top: int = 100) -> list[Detections]:
    """Deformable models: the `top` best (query, class) pairs; a query may answer with several classes."""
    return best_pairs(output.logits.float().sigmoid(), output.boxes, sizes, top)


def best_pairs(scores: Tensor, boxes: Tensor, sizes: Tensor, top: int = 100) -> list[Detections]:
    """The `top` best (query, class) pairs by score (B, Q, K), with the boxes (B, Q, 4) of their queries."""
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    best, index = flat.topk(min(top, flat.shape[1]), dim=1)
    return [
        Detections(score, i % classes, box[torch.div(i, classes, rounding_mode="floor")])
        for score, i, box in zip(best, index, _pixels(boxes, sizes), strict=True)
    ]


def _pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Normalised cxcywh (B, Q, 4) as xyxy in pixels of pictures (B, 2) of height and width."""
    height, width = sizes.to(boxes.device).unbind(1)
    scale = torch.stack((width, height, width, height), 1)
    return cxcywh_to_xyxy(boxes.float()) * scale[:, None]
