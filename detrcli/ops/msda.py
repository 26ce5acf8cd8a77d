"""Multi-scale deformable attention in plain torch: what the native kernels are measured and tested against.

Two forms give the same numbers. `reference` samples with `grid_sample`; `gather` uses indexing only, for export targets
whose GridSample cannot be trusted. Both work in float32 (float64 for float64), whatever the inputs, and follow one rule:
a query whose sampling location is NaN or infinite answers NaN in that head; in backward such a sample counts as outside.

Inside, images and heads are one dimension N = B*M and queries come last, so that every operation runs along them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, Tensor], Tensor]
"""(level (N, D, H, W), places (N, P, Q, 2) in [0, 1]) -> (N, D, P, Q), zeros outside."""

# outside any level, even one pixel wide; so is all that lies further from the middle than 2
FAR_OUTSIDE = -2.0


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
        return anchor[..., :2] + in_boxes(offsets, anchor[..., 2:])
    # an empty level has no pixels to count in; its samples are outside anyway
    sizes = [(max(width, 1), max(height, 1)) for height, width in shapes]
    return anchor + offsets / like(offsets, sizes).view(len(shapes), 1, 2)


def in_boxes(offsets: Tensor, sizes: Tensor) -> Tensor:
    """Offsets in units of half a box over P, in parts of the picture; (..., P, 2).

    The gradient of a product is the other factor's multiple, and NaN where that is not finite, though nothing reached the
    sample: there the product is a number without factors.
    """
    moved = offsets / offsets.shape[-2] * sizes * 0.5
    if torch.compiler.is_exporting():  # no gradients
        return moved
    finite = moved.detach().isfinite()
    offsets, sizes = torch.where(finite, offsets, 0.0), torch.where(finite, sizes, 0.0)
    return torch.where(finite, offsets / offsets.shape[-2] * sizes * 0.5, moved.detach())


def like(tensor: Tensor, numbers: Sequence[Any]) -> Tensor:
    """Numbers in the type and at the place of a tensor; unlike `new_tensor`, sizes stay variable in an exported graph."""
    return torch.tensor(numbers, dtype=tensor.dtype).to(tensor.device, non_blocking=True)


def sample_grid(level: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples by `grid_sample`, see `Sampler`."""
    return F.grid_sample(level, 2 * places - 1, mode="bilinear", padding_mode="zeros", align_corners=False)


def sample_gather(level: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples by four gathers, see `Sampler`."""
    depth, height, width = level.shape[1:]
    pixel = places * like(places, [width, height]) - 0.5
    corner = pixel.detach().floor()
    fraction = pixel - corner  # (N, P, Q, 2)
    table = level.flatten(2)
    sampled = torch.zeros((), dtype=level.dtype, device=level.device)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = corner[..., 0].long() + dx, corner[..., 1].long() + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = torch.where(inside, y * width + x, 0).flatten(1)[:, None].expand(-1, depth, -1)
        pixels = table.gather(2, index).view(-1, depth, *places.shape[1:3])
        x_share = fraction[..., 0] if dx else 1 - fraction[..., 0]
        y_share = fraction[..., 1] if dy else 1 - fraction[..., 1]
        # where, not a zero weight: a NaN in the pixel that stands in for "outside" must not leak
        sampled = sampled + torch.where(inside[:, None], pixels, 0.0) * (x_share * y_share)[:, None]
    return sampled


def sample_levels(value: Tensor, shapes: Shapes, locations: Tensor, sampler: Sampler) -> list[Tensor | None]:
    """The samples of each level, (N, D, P, Q); None where a level is empty (all its samples are zero).

    value: (B, S, M, D); locations: (B, Q, M, L, P, 2).
    """
    if 0 in (value.shape[0], *value.shape[2:], *locations.shape[1:5]):
        return [None] * len(shapes)
    near = (locations.detach() - 0.5).abs() < 2  # not so for NaN
    places = torch.where(near, locations, FAR_OUTSIDE).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    rows = value.permute(0, 2, 3, 1).flatten(0, 1)  # (N, D, S)
    levels = torch.split(rows, [height * width for height, width in shapes], dim=2)
    return [
        sampler(level.view(*level.shape[:2], *shape), places[i]) if shape[0] * shape[1] else None
        for i, (level, shape) in enumerate(zip(levels, shapes, strict=True))
    ]


def weighted_sum(
    samples: Sequence[Tensor | None], weights: Sequence[Tensor], locations: Tensor, depth: int
) -> Tensor:
    """(B, Q, M*D) from the samples (N, D, P, Q) and weights (N, P, Q) of each level; locations: (B, Q, M, L, P, 2)."""
    batch, queries, heads = locations.shape[:3]
    answer = poison(locations).expand(batch * heads, depth, queries)
    for sampled, shares in zip(samples, weights, strict=True):
        if sampled is not None:
            # point by point: the product of a whole level is too large for the cache, and for memory kept at hand
            for at_point, share in zip(sampled.unbind(2), shares.unbind(1), strict=True):
                answer = torch.addcmul(answer, at_point, share[:, None])
    return answer.view(batch, heads, depth, queries).permute(0, 3, 1, 2).flatten(2)


def poison(locations: Tensor) -> Tensor:
    """(N, 1, Q): zero, or NaN where a location of that query and head is not finite.

    An exported graph does without, (1,): what made the location carries the NaN on beside the attention.
    """
    if torch.compiler.is_exporting():
        return locations.new_zeros(1)
    return (locations.detach() * 0).sum(dim=(3, 4, 5)).transpose(1, 2).flatten(0, 1)[:, None]


def msda_plain(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, sampler: Sampler = sample_grid
) -> Tensor:
    """Weighted sum of bilinear samples, (B, Q, M*D) in value's dtype; see `detrcli.ops.msda`."""
    dtype = working_dtype(value)
    locations = locations.to(dtype)
    samples = sample_levels(value.to(dtype), shapes, locations, sampler)
    shares = weights.to(dtype).permute(3, 0, 2, 4, 1).flatten(1, 2).unbind()  # L times (N, P, Q)
    return weighted_sum(samples, shares, locations, value.shape[3]).to(value.dtype)


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
    dtype = working_dtype(value)
    locations = sampling_locations(shapes, reference.to(dtype), offsets.to(dtype))
    weights = logits.to(dtype).softmax(dim=-1).reshape(offsets.shape[:5])
    return msda_plain(without_padding(value, mask), shapes, locations, weights, sampler)


def without_padding(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, M, D) with the rows of padding set to zero; mask: (B, S), True on padding."""
    return rows if mask is None else rows.masked_fill(mask[:, :, None, None], 0.0)
