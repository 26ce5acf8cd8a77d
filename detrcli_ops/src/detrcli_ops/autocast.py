"""Autocast: rows (value, key, query) as a matrix product would get them; geometry is never lowered.

A location in 16 bits is up to a tenth of a pixel off on a wide level, so locations, offsets, references and weights stay
what the caller made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

KINDS: Final = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
library: Final = torch.library.Library("detrcli_ops", "IMPL")
ops = torch.ops.detrcli_ops


def register(key: str, kind: str) -> None:
    def lowered(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(kind))

    def msda(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(kind, enabled=False):
            answer: Tensor = ops.msda(lowered(value), shapes, locations, weights)
        return answer

    def msda_fused(
        value: Tensor,
        shapes: Sequence[int],
        reference: Tensor,
        offsets: Tensor,
        logits: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        with torch.autocast(kind, enabled=False):
            answer: Tensor = ops.msda_fused(lowered(value), shapes, reference, offsets, logits, mask)
        return answer

    def kda(
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        shapes: Sequence[int],
        reference: Tensor,
        offsets: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        key = None if key is None else lowered(key)
        with torch.autocast(kind, enabled=False):
            answer: Tensor = ops.kda(
                lowered(query), key, lowered(value), shapes, reference, offsets, mask, scale
            )
        return answer

    library.impl("msda", msda, key)
    library.impl("msda_fused", msda_fused, key)
    library.impl("kda", kda, key)


for dispatch_key, device_kind in KINDS.items():
    register(dispatch_key, device_kind)
