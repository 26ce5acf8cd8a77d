"""Key-aware deformable attention (Lite DETR) in plain torch; forms and rule for non-finite locations as in `msda`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrcli.ops.msda import (
    Sampler,
    Shapes,
    sample_grid,
    sample_levels,
    sampling_locations,
    weighted_sum,
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

    def sampled(rows: Tensor) -> list[Tensor | None]:
        return sample_levels(without_padding(rows, mask).to(dtype), shapes, locations, sampler)

    values = sampled(value)
    keys = values if key is value else sampled(key)
    weights = key_aware_weights(query.to(dtype) * scale, keys, locations.shape[4])
    return weighted_sum(values, weights, locations, value.shape[3]).to(value.dtype)


def key_aware_weights(query: Tensor, keys: Sequence[Tensor | None], points: int) -> tuple[Tensor, ...]:
    """(N, P, Q) for each level: softmax over all samples of all levels together. query: (B, Q, M, D); keys: (N, D, P, Q).

    A sample outside the picture or on padding is a zero key: its logit is 0 and it keeps its share, as in the paper's code.
    """
    asked = query.permute(0, 2, 3, 1).flatten(0, 1)[:, :, None]  # (N, D, 1, Q)
    outside = asked.new_zeros((asked.shape[0], points, asked.shape[3]))
    logits = [outside if sampled is None else (asked * sampled).sum(dim=1) for sampled in keys]
    if not logits:
        return ()
    weights = torch.cat(logits, dim=1).softmax(dim=1)
    return weights.view(asked.shape[0], len(keys), points, asked.shape[3]).unbind(1)
