"""Multi-scale deformable attention in plain torch: what the native kernels are measured and tested against.

Two forms give the same numbers. `reference` samples with `grid_sample`; `gather` uses indexing only, for export targets
whose GridSample cannot be trusted. Both work in float32 (float64 for float64), whatever the inputs, and follow one rule:
a query whose sampling location is NaN or infinite answers NaN in that head; in backward such a sample counts as outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, int, int, Tensor], Tensor]
"""(rows (B, H*W, M, D), H, W, locations (B, Q, M, P, 2)) -> (B, Q, M, P, D), zeros outside."""

FAR_OUTSIDE = -2.0  # outside any level, even one pixel wide


def working_dtype(value: Tensor) -> torch.dtype:
    """The dtype the arithmetic runs in: float64 for float64, otherwise float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def sampling_locations(shapes: Shapes, reference: Tensor, offsets: Tensor) -> Tensor:
    """Where each query looks, (B, Q, M, L, P, 2) in [0, 1] of the padded picture.

    reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh; offsets: (B, Q, M, L, P, 2), in pixels of the level for
    points, in units of half a box over P for boxes.
    """
    anchor = reference[:, :, None, :, None, :]  # (B, Q, 1, L, 1, 2|4)
    if reference.shape[-1] == 4:
        return anchor[..., :2] + offsets / offsets.shape[4] * anchor[..., 2:] * 0.5
    # an empty level has no pixels to count in; its samples are outside anyway
    sizes = [(max(width, 1), max(height, 1)) for height, width in shapes]
    return anchor + offsets / like(offsets, sizes).view(len(shapes), 1, 2)


def like(tensor: Tensor, numbers: Sequence[Any]) -> Tensor:
    """Numbers in the type and at the place of a tensor; unlike `new_tensor`, sizes stay variable in an exported graph."""
    return torch.tensor(numbers, dtype=tensor.dtype).to(tensor.device, non_blocking=True)


def sample_grid(rows: Tensor, height: int, width: int, locations: Tensor) -> Tensor:
    """Bilinear samples by `grid_sample`, see `Sampler`."""
    batch, _, heads, depth = rows.shape
    image = rows.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.view(batch, heads, depth, *locations.shape[1:4:2]).permute(0, 3, 1, 4, 2)


def sample_gather(rows: Tensor, height: int, width: int, locations: Tensor) -> Tensor:
    """Bilinear samples by four gathers, see `Sampler`."""
    batch, _, heads, depth = rows.shape
    queries, points = locations.shape[1], locations.shape[3]
    size = like(locations, [width, height])
    pixel = locations * size - 0.5
    corner = pixel.detach().floor()
    fraction = pixel - corner  # (B, Q, M, P, 2)
    table = rows.transpose(1, 2)  # (B, M, H*W, D)
    sampled = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = corner[..., 0].long() + dx, corner[..., 1].long() + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = (
            torch.where(inside, y * width + x, 0).transpose(1, 2).reshape(batch, heads, queries * points, 1)
        )
        row = (
            table.gather(2, index.expand(-1, -1, -1, depth))
            .view(batch, heads, queries, points, depth)
            .transpose(1, 2)
        )
        x_share = fraction[..., 0] if dx else 1 - fraction[..., 0]
        y_share = fraction[..., 1] if dy else 1 - fraction[..., 1]
        # where, not a zero weight: a NaN in the row that stands in for "outside" must not leak
        sampled = sampled + torch.where(inside[..., None], row, 0.0) * (x_share * y_share)[..., None]
    return sampled


def sample_levels(value: Tensor, shapes: Shapes, locations: Tensor, sampler: Sampler) -> list[Tensor | None]:
    """The samples of each level, (B, Q, M, P, D); None where a level is empty (all its samples are zero).

    value: (B, S, M, D); locations: (B, Q, M, L, P, 2).
    """
    locations = torch.nan_to_num(locations, nan=FAR_OUTSIDE).clamp(FAR_OUTSIDE, 1 - FAR_OUTSIDE)
    if 0 in (value.shape[0], value.shape[2], value.shape[3], locations.shape[1], locations.shape[4]):
        return [None] * len(shapes)
    levels = torch.split(value, [height * width for height, width in shapes], dim=1)
    return [
        sampler(rows, height, width, locations[:, :, :, level]) if height * width else None
        for level, (rows, (height, width)) in enumerate(zip(levels, shapes, strict=True))
    ]


def poison(locations: Tensor) -> Tensor:
    """(B, Q, M, 1): zero, or NaN where a location of that query and head is not finite.

    An exported graph does without, (1,): what made the location carries the NaN on beside the attention.
    """
    if torch.compiler.is_exporting():
        return locations.new_zeros(1)
    return (locations.detach() * 0).sum(dim=(3, 4, 5)).unsqueeze(-1)


def msda_plain(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, sampler: Sampler = sample_grid
) -> Tensor:
    """Weighted sum of bilinear samples, (B, Q, M*D) in value's dtype; see `detrcli.ops.msda`."""
    dtype = working_dtype(value)
    locations, weights = locations.to(dtype), weights.to(dtype)
    answer = poison(locations) + value.new_zeros((), dtype=dtype).expand(*locations.shape[:3], value.shape[3])
    for level, sampled in enumerate(sample_levels(value.to(dtype), shapes, locations, sampler)):
        if sampled is not None:
            answer = answer + (sampled * weights[:, :, :, level, :, None]).sum(dim=3)
    return answer.flatten(2).to(value.dtype)


def msda_fused_plain(
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    sampler: Sampler = sample_grid,
) -> Tensor:
    """`msda_plain` from what the layers predict; see `detrcli.ops.msda_fused`."""
    samples = fused_samples(shapes, reference, offsets, logits, working_dtype(value))
    return msda_plain(without_padding(value, mask), shapes, *samples, sampler)


def fused_samples(
    shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where the queries of `msda_fused` look, (B, Q, M, L, P, 2), and with which weight, (B, Q, M, L, P)."""
    locations = sampling_locations(shapes, reference.to(dtype), offsets.to(dtype))
    return locations, logits.to(dtype).softmax(dim=-1).reshape(offsets.shape[:5])


def without_padding(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, M, D) with the rows of padding set to zero; mask: (B, S), True on padding."""
    return rows if mask is None else rows.masked_fill(mask[:, :, None, None], 0.0)
