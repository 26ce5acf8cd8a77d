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
    return per_picture(scores, labels.gather(1, order), _rows(_pixels(output.boxes, sizes), order))


def sigmoid_topk(output: Output, sizes: Tensor, top: int = 100) -> list[Detections]:
    """Deformable models: the `top` best (query, class) pairs; a query may answer with several classes."""
    return best_pairs(output.logits.float().sigmoid(), output.boxes, sizes, top)


def best_pairs(scores: Tensor, boxes: Tensor, sizes: Tensor, top: int = 100) -> list[Detections]:
    """The `top` best (query, class) pairs by score (B, Q, K), with the boxes (B, Q, 4) of their queries."""
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    best, index = flat.topk(min(top, flat.shape[1]), dim=1)
    query = torch.div(index, classes, rounding_mode="floor")
    return per_picture(best, index % classes, _rows(_pixels(boxes, sizes), query))


def per_picture(scores: Tensor, labels: Tensor, boxes: Tensor) -> list[Detections]:
    """Detections of a batch (B, N), (B, N) and (B, N, 4), one a picture; while a graph of any batch size is exported, one in all."""
    if torch.compiler.is_exporting():
        return [Detections(scores, labels, boxes)]
    return [Detections(*rows) for rows in zip(scores, labels, boxes, strict=True)]


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (B, Q, 4) at index (B, N) -> (B, N, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def _pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Normalised cxcywh (B, Q, 4) as xyxy in pixels of pictures (B, 2) of height and width."""
    height, width = sizes.to(boxes.device).unbind(1)
    scale = torch.stack((width, height, width, height), 1)
    return cxcywh_to_xyxy(boxes.float()) * scale[:, None]
