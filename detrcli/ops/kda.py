"""Key-aware deformable attention (Lite DETR) in plain torch; forms and rule for non-finite locations as in `msda`."""

from __future__ import annotations

import torch
from torch import Tensor

from detrcli.ops.msda import (
    Sampler,
    Shapes,
    poison,
    sample_grid,
    sample_levels,
    sampling_locations,
    without_padding,
    working_dtype,
)


def kda_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale: float,
    sampler: Sampler = sample_grid,
) -> Tensor:
    """Attention over the sampled keys, (B, Q, M*D) in value's dtype; see `detrcli.ops.kda`."""
    dtype = working_dtype(value)
    locations = sampling_locations(shapes, reference.to(dtype), offsets.to(dtype))
    shared, value = key is value, without_padding(value, mask)
    key = value if shared else without_padding(key, mask)
    return kda_sampled(query, key, value, shapes, locations, scale, sampler)


def kda_sampled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    scale: float,
    sampler: Sampler = sample_grid,
) -> Tensor:
    """The same at given locations (B, Q, M, L, P, 2); rows of padding are zero already."""
    dtype = working_dtype(value)
    values = sample_levels(value.to(dtype), shapes, locations, sampler)
    keys = values if key is value else sample_levels(key.to(dtype), shapes, locations, sampler)
    weights = key_aware_weights(query.to(dtype), keys, locations.shape[4], scale)
    answer = poison(locations) + value.new_zeros((), dtype=dtype).expand(*locations.shape[:3], value.shape[3])
    for level, sampled in enumerate(values):
        if sampled is not None:
            answer = answer + (sampled * weights[:, :, :, level, :, None]).sum(dim=3)
    return answer.flatten(2).to(value.dtype)


def key_aware_weights(query: Tensor, keys: list[Tensor | None], points: int, scale: float) -> Tensor:
    """(B, Q, M, L, P): softmax over all samples of all levels together.

    A sample outside the picture or on padding is a zero key: its logit is 0 and it keeps its share, as in the paper's code.
    """
    outside = query.new_zeros((*query.shape[:3], points))
    logits = [
        outside if sampled is None else (query[:, :, :, None] * sampled).sum(dim=-1) * scale
        for sampled in keys
    ]
    if not logits:
        return query.new_zeros((*query.shape[:3], 0, points))
    return torch.stack(logits, dim=3).flatten(3).softmax(dim=-1).view(*query.shape[:3], len(keys), points)
