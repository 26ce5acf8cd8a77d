"""Modulated deformable convolution and RoIAlign, each behind one signature.

    deform_conv2d   out(p) = bias + sum over nine taps k of  weight_k · mask_k(p) · x(stride p + k + offset_k(p))
                    x bilinear, 0 outside (Deformable ConvNets v2, Zhu et al., CVPR 2019)
    roi_align       the mean of samples² bilinear samples in each of size² bins of a box (Mask R-CNN, He et al., ICCV 2017)

Both are torchvision's operators. On a CPU those are slow, backward above all, because they walk through channels one by one;
there the gathered forms give the same answers several times faster (benchmarks/dynamic_detr.py). In ONNX the operators become
DeformConv (opset 19) and RoiAlign; `sampled` needs no DeformConv.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from detrcli.ops.checks import autocasts
from detrcli_dynamic_detr.config import Operators

TAPS = 9


def _as_it_is(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast; where it is off there is nothing to do, and nothing to trace."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    form: Operators = "auto",
) -> Tensor:
    """x (B, C, H, W), weight (D, C, 3, 3), bias (D,) -> (B, D, H', W').

    offset (B, 18, H', W') holds (dy, dx) of each tap, row by row, and must not be NaN; mask (B, 9, H', W').
    """
    x, offset, mask, weight, bias = (_single(t) for t in (x, offset, mask, weight, bias))
    with _as_it_is(x):
        if form == "grid_sample":
            return sampled(x, offset, mask, weight, bias, stride)
        if form == "auto" and _gathers(x):
            return gathered(x, offset, mask, weight, bias, stride)
        answer: Tensor = torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding=1, mask=mask)
        return answer


def roi_align(x: Tensor, boxes: Tensor, *, size: int, samples: int, form: Operators = "auto") -> Tensor:
    """x (B, C, H, W) and boxes (B, Q, 4), xyxy in pixels of x -> (B, Q, size * size, C).

    Pixel (i, j) covers [i, i+1) x [j, j+1). All samples must lie within the outermost pixel centres.
    """
    x, boxes = _single(x), _single(boxes).to(x.device)
    with _as_it_is(x):
        if form == "auto" and _gathers(x):
            return gathered_roi_align(x, boxes, size, samples)
        image = _count(boxes.shape[0], boxes)[:, None, None]
        rois = torch.cat((image.expand(-1, boxes.shape[1], 1), boxes), -1).view(
            -1, 5
        )  # OpenVINO loses the 5 of a flatten
        bins = torchvision.ops.roi_align(x, rois.to(x.dtype), size, sampling_ratio=samples, aligned=True)
        answer: Tensor = bins.unflatten(0, boxes.shape[:2]).flatten(-2).mT
        return answer


def gathered(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """`deform_conv2d` with each sample as a weighted sum of four pixels, then one matrix product."""
    batch, channels, height, width = x.shape
    y, x_ = places(offset, stride)
    (rows, y_share), (columns, x_share) = neighbours(y, height), neighbours(x_, width)
    pixel = rows[..., :, None] * width + columns[..., None, :]  # (B, 9, H', W', 2, 2)
    share = (y_share * mask[..., None])[..., :, None] * x_share[..., None, :]
    order = (0, 2, 3, 1, 4, 5)
    samples = weighted_pixels(x, pixel.permute(order).flatten(4), share.permute(order).flatten(4))
    kernel = weight.permute(2, 3, 1, 0).reshape(TAPS * channels, -1)
    out = torch.addmm(bias, samples.view(-1, TAPS * channels), kernel)
    return out.view(batch, *offset.shape[-2:], -1).permute(0, 3, 1, 2)


def gathered_roi_align(x: Tensor, boxes: Tensor, size: int, samples: int) -> Tensor:
    """`roi_align` with each bin as a weighted sum of (2 · samples)² pixels."""
    height, width = x.shape[-2:]
    step = (_count(size * samples, x) + 0.5) / (size * samples)
    sides = boxes[..., 2:] - boxes[..., :2]
    place = boxes[..., :2, None] + sides[..., None] * step - 0.5  # (B, Q, 2, size * samples)
    bins = (*boxes.shape[:2], size, 2 * samples)
    columns, x_share = (part.view(bins) for part in neighbours(place[:, :, 0], width))
    rows, y_share = (part.view(bins) for part in neighbours(place[:, :, 1], height))
    pixel = rows[:, :, :, None, :, None] * width + columns[:, :, None, :, None, :]
    share = y_share[:, :, :, None, :, None] * x_share[:, :, None, :, None, :] / samples**2
    return weighted_pixels(x, pixel.flatten(4), share.flatten(4)).flatten(2, 3)


def weighted_pixels(x: Tensor, pixel: Tensor, share: Tensor) -> Tensor:
    """Sums of pixels of x (B, C, H, W): pixel and share (B, ..., n) -> (B, ..., C). A pixel's channels lie side by side."""
    batch, channels, height, width = x.shape
    first = torch.arange(batch, device=x.device).view(-1, *[1] * (pixel.dim() - 1)) * (height * width)
    out = F.embedding_bag(
        (pixel + first).flatten(0, -2),
        x.permute(0, 2, 3, 1).reshape(-1, channels),
        per_sample_weights=share.flatten(0, -2),
        mode="sum",
    )
    return out.view(*pixel.shape[:-1], channels)


def sampled(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """`deform_conv2d` with the samples by grid_sample, a map of columns a tap, then one matrix product."""
    batch, channels, height, width = x.shape
    out_height, out_width = offset.shape[-2:]
    y, x_ = places(offset, stride)
    grid = torch.stack(((2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    columns = F.grid_sample(x, grid.view(batch, TAPS * out_height, out_width, 2), align_corners=False)
    columns = columns.view(batch, channels, TAPS, -1) * mask.flatten(2)[:, None]
    out = weight.flatten(1) @ columns.flatten(1, 2)
    return out.view(batch, -1, out_height, out_width) + bias[:, None, None]


def places(offset: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Row and column, in pixels of the input, where each tap reads: (B, 9, H', W') each."""
    batch, _, height, width = offset.shape
    dy, dx = offset.view(batch, TAPS, 2, height, width).unbind(2)
    tap = _count(3, offset) - 1
    y = dy + (_count(height, offset) * stride)[:, None] + tap.repeat_interleave(3).view(TAPS, 1, 1)
    x = dx + _count(width, offset) * stride + tap.repeat(3).view(TAPS, 1, 1)
    return y, x


def neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels around each place along one axis, and their shares of it: 0 for those outside; (..., 2) both."""
    low = place.floor()
    both = torch.stack((low, low + 1), -1)
    share = torch.stack((1 - (place - low), place - low), -1)
    inside = (both >= 0) & (both <= size - 1)
    return both.clamp(0, size - 1).long(), share * inside


def _count(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, dtype=like.dtype, device=like.device)


def _single(x: Tensor) -> Tensor:
    """Half precision as float32: places of samples, and sums over many, are never computed in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _gathers(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_exporting()
