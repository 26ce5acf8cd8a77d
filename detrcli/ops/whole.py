"""Deformable attention as one operator of torch, for exporters that write it out themselves (`detrcli.export.attention`).

In plain torch it is some eighty operators a layer. An exporter computes the shapes of each several times, of sizes that are
symbols; that was most of its time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from detrcli.ops.kda import kda_plain
from detrcli.ops.msda import Shapes, msda_fused_plain

_asked: ContextVar[bool] = ContextVar("asked", default=False)


@contextmanager
def use() -> Iterator[None]:
    """Inside the block attention in plain torch is one operator, in this thread; never for torch.compile."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> bool:
    return not torch.compiler.is_dynamo_compiling() and _asked.get()


def pairs(sizes: Sequence[int]) -> Shapes:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@torch.library.custom_op(
    "detrcli::msda_fused",
    mutates_args=(),
    schema="(Tensor value, SymInt[] sizes, Tensor reference, Tensor offsets, Tensor logits, Tensor? mask) -> Tensor",
)
def msda_fused(
    value: Tensor,
    sizes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`msda_fused_plain`; sizes: height and width of each level, one after the other."""
    return msda_fused_plain(value, pairs(sizes), reference, offsets, logits, mask)


@torch.library.custom_op(
    "detrcli::kda",
    mutates_args=(),
    schema="(Tensor query, Tensor? key, Tensor value, SymInt[] sizes, Tensor reference, Tensor offsets, Tensor? mask, "
    "float scale) -> Tensor",
)
def kda(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    sizes: Sequence[int],
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """`kda_plain`; key None: the values."""
    key = value if key is None else key
    return kda_plain(query, key, value, pairs(sizes), reference, offsets, mask, scale)


@msda_fused.register_fake
def _(
    value: Tensor, sizes: Sequence[int], reference: Tensor, offsets: Tensor, *rest: Tensor | None
) -> Tensor:
    return value.new_empty((*offsets.shape[:2], value.shape[2] * value.shape[3]))


@kda.register_fake
def _(query: Tensor, key: Tensor | None, value: Tensor, *rest: object) -> Tensor:
    return value.new_empty((*query.shape[:2], value.shape[2] * value.shape[3]))
