"""Shapes and dtypes of the answers, for tracing; the arguments are checked by the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def none(like: Tensor) -> Tensor:
    return like.new_empty(0)


def wanted(need: bool, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if need else none(like)


def answer(value: Tensor, locations: Tensor) -> Tensor:
    batch, _, heads, depth = value.shape
    return value.new_empty(batch, locations.shape[1], heads * depth)


@torch.library.register_fake("detrcli_ops::msda")
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return answer(value, locations)


@torch.library.register_fake("detrcli_ops::msda_backward")
def _(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    need_rows: bool,
    need_geometry: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return wanted(need_rows, value), wanted(need_geometry, locations), wanted(need_geometry, weights)


@torch.library.register_fake("detrcli_ops::msda_fused")
def _(
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    mask: Tensor | None,
) -> Tensor:
    return answer(value, offsets)


@torch.library.register_fake("detrcli_ops::msda_fused_backward")
def _(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    need_rows: bool,
    need_geometry: bool,
    need_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        wanted(need_rows, value),
        wanted(need_reference, reference),
        wanted(need_geometry, offsets),
        wanted(need_geometry, logits),
    )


@torch.library.register_fake("detrcli_ops::kda")
def _(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    return answer(value, offsets)


@torch.library.register_fake("detrcli_ops::kda_backward")
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale: float,
    need_rows: bool,
    need_geometry: bool,
    need_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        wanted(need_geometry, query),
        wanted(need_rows, key) if key is not None else none(value),
        wanted(need_rows, value),
        wanted(need_reference, reference),
        wanted(need_geometry, offsets),
    )


@torch.library.register_fake("detrcli_ops::normalise")
def _(rows: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    pass
