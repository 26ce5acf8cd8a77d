"""The terms of a set prediction loss, batched over prediction layers, and the class costs that match them.

Shapes: logits (L, B, Q, K), labels of matched predictions (N,) with their places as three index tensors (layer, image, query).
Class losses return one sum for each layer; who calls divides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Places = tuple[Tensor, Tensor, Tensor]  # layer, image and query of every matched prediction

ALPHA, GAMMA = 0.25, 2.0  # focal loss, as every deformable model since RetinaNet uses it


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """-p(label): logits (L, B, Q, K), labels (B, T) -> (L, B, T, Q)."""
    chosen = _channels_of(logits, labels)
    return -(chosen - logits.logsumexp(-1)[:, :, None, :]).exp()


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """The focal loss of calling a prediction `label` less that of calling it background; shapes as `softmax_cost`."""
    p = _channels_of(logits, labels).sigmoid()
    as_object = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    as_background = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    return as_object - as_background


def _channels_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of each target's label: (L, B, Q, K), (B, T) -> (L, B, T, Q)."""
    layers, batch, queries, _ = logits.shape
    index = labels[None, :, None, :].expand(layers, batch, queries, labels.shape[-1])
    return logits.gather(-1, index).transpose(2, 3)


def softmax_loss(
    logits: Tensor, places: Places, labels: Tensor, num_boxes: Tensor, no_object: float
) -> Tensor:
    """Cross entropy, its mean weighted by `no_object` where the last channel is right; one value a layer.

    As DETR does, the mean divides by the sum of the weights, not by the number of objects. That sum is written with the mean
    number of objects of a backward pass, so that ranks and accumulated parts add up to the loss of the whole batch.
    """
    background = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], background, dtype=torch.int64, device=logits.device)
    wanted[places] = labels
    nll = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view(wanted.shape)
    weighted = torch.where(wanted == background, no_object * nll, nll).flatten(1).sum(1)
    predictions, num_boxes = wanted[0].numel(), num_boxes.to(nll.dtype)
    return weighted / (num_boxes + no_object * (predictions - num_boxes).clamp(min=0))


def focal_loss(logits: Tensor, places: Places, labels: Tensor) -> Tensor:
    """Sigmoid focal loss summed over queries and classes, one value a layer; the caller divides by the number of objects."""
    background: Tensor = _FocalBackground.apply(logits)
    x = logits[(*places, labels)]  # the few channels that should be 1: correct the sum for them
    p = x.sigmoid()
    as_object = ALPHA * (1 - p) ** GAMMA * F.softplus(-x)
    as_background = (1 - ALPHA) * p**GAMMA * F.softplus(x)
    return background.index_add(0, places[0], as_object - as_background)


class _FocalBackground(torch.autograd.Function):
    """Focal loss of logits (L, ...) as if all were background, summed for each layer; the gradient in closed form.

    Autograd would keep five tensors of the size of the logits; this keeps one, the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        p = logits.sigmoid()
        softplus = F.softplus(logits)
        square = p * p
        # in place: these are the largest tensors of a criterion, and memory for another one costs more than its arithmetic
        gradient = (1 - p).mul_(softplus).mul_(2).add_(p).mul_(square).mul_(1 - ALPHA)
        ctx.save_for_backward(gradient)
        return (1 - ALPHA) * softplus.mul_(square).flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        scale = grad_outputs[0].view(-1, *[1] * (gradient.dim() - 1))
        result: Tensor = gradient * scale
        return result
