"""Arguments that cannot be meant, refused in one line before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrcli.ops.msda import Shapes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_msda(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    check_levels(value, shapes, "value")
    batch, _, heads, _ = value.shape
    check_shape("locations", locations, (batch, None, heads, len(shapes), None, 2))
    check_shape("weights", weights, tuple(locations.shape[:5]))
    check_kinds({"value": value}, {"locations": locations, "weights": weights})


def check_fused(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor, mask: Tensor | None
) -> None:
    check_levels(value, shapes, "value")
    check_geometry(value, shapes, reference, offsets, mask)
    batch, queries, heads, levels, points, _ = offsets.shape
    check_shape("logits", logits, (batch, queries, heads, levels * points))
    check_kinds({"value": value}, {"reference": reference, "offsets": offsets, "logits": logits}, mask)


def check_kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
) -> None:
    check_levels(value, shapes, "value")
    check_shape("key", key, tuple(value.shape))
    check_geometry(value, shapes, reference, offsets, mask)
    check_shape("query", query, (*offsets.shape[:3], value.shape[3]))
    check_kinds(
        {"value": value, "key": key, "query": query}, {"reference": reference, "offsets": offsets}, mask
    )


def check_levels(value: Tensor, shapes: Shapes, name: str) -> None:
    if value.ndim != 4:
        raise ValueError(f"{name} must be (B, S, M, D), got {tuple(value.shape)}")
    for height, width in shapes:
        if height < 0 or width < 0:
            raise ValueError(f"level shapes must not be negative, got {list(shapes)}")
    tokens = sum(height * width for height, width in shapes)
    if tokens != value.shape[1]:
        raise ValueError(f"{name} has {value.shape[1]} tokens but the levels {list(shapes)} have {tokens}")


def check_geometry(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, mask: Tensor | None
) -> None:
    batch, tokens, heads, _ = value.shape
    check_shape("offsets", offsets, (batch, None, heads, len(shapes), None, 2))
    if reference.ndim != 4 or reference.shape[3] not in (2, 4):
        raise ValueError(f"reference must be (B, Q, L, 2) or (B, Q, L, 4), got {tuple(reference.shape)}")
    check_shape("reference", reference, (batch, offsets.shape[1], len(shapes), None))
    if mask is not None:
        check_shape("mask", mask, (batch, tokens))
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True on padding), got {mask.dtype}; use mask.bool()")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """None in `expected` stands for any size."""
    if tensor.ndim == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    ):
        return
    wanted = ", ".join("*" if size is None else str(size) for size in expected)
    raise ValueError(f"{name} must be ({wanted}), got {tuple(tensor.shape)}")


def check_kinds(rows: dict[str, Tensor], geometry: dict[str, Tensor], mask: Tensor | None = None) -> None:
    """One device; rows of one dtype; float64 with float64 only, all other mixes of rows and geometry are fine."""
    everything = rows | geometry
    first, value = next(iter(rows.items()))
    for name, tensor in everything.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if (tensor.dtype == torch.float64) != (value.dtype == torch.float64):
            raise TypeError(
                f"{name} is {tensor.dtype} but {first} is {value.dtype}; float64 needs all float64"
            )
    if not autocasts(value.device.type):
        for name, tensor in rows.items():
            if tensor.dtype != value.dtype:
                raise TypeError(f"{name} is {tensor.dtype} but {first} is {value.dtype}; cast one of them")
    for name, tensor in (everything if mask is None else everything | {"mask": mask}).items():
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device} but {first} on {value.device}; move one of them")


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this kind of device; some kinds (meta) do not know it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
