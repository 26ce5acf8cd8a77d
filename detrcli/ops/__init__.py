"""Operators: one signature each, answered by the native wheel or by plain torch. Deformable attention, and `normalise`,
which prepares pictures.

Level shapes are Python ints, one (height, width) per level; tokens are ordered level by level, row by row. Outputs have
value's dtype, (B, Q, M*D). A query whose sampling location is NaN or infinite answers NaN in that head; a finite location
outside the picture samples zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detrcli.ops import checks, whole
from detrcli.ops.dispatch import Backend, Mode, Sizes, backend, use, watched
from detrcli.ops.kda import kda_plain
from detrcli.ops.msda import Shapes, msda_fused_plain, msda_plain, sample_gather, sample_grid
from detrcli.ops.normalise import normalise

__all__ = [
    "Backend",
    "Mode",
    "Shapes",
    "backend",
    "kda",
    "msda",
    "msda_fused",
    "normalise",
    "use",
    "watched",
]

SAMPLERS = {"reference": sample_grid, "gather": sample_gather}


def msda(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, form: Mode | None = None
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR), (B, Q, M*D).

    value: (B, S, M, D); locations: (B, Q, M, L, P, 2), x and y in [0, 1]; weights: (B, Q, M, L, P).
    """
    if (
        not torch.compiler.is_exporting()
    ):  # where sizes are symbols each comparison is slow, and the model has run before
        checks.check_msda(value, shapes, locations, weights)
    name = backend(value.device, form, sizes_of(value, shapes)).name
    if name == "native":
        return native("msda", value, flat(shapes), locations, weights)
    (value,) = lowered(value)
    return msda_plain(value, shapes, locations, weights, SAMPLERS[name])


def msda_fused(
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    form: Mode | None = None,
) -> Tensor:
    """`msda` with softmax, location arithmetic and padding inside, (B, Q, M*D).

    value: (B, S, M, D); reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh; offsets: (B, Q, M, L, P, 2);
    logits: (B, Q, M, L*P), one softmax over all samples; mask: (B, S), True on padding, whose rows count as zero.
    """
    if not torch.compiler.is_exporting():
        checks.check_fused(value, shapes, reference, offsets, logits, mask)
    name = backend(value.device, form, sizes_of(value, shapes)).name
    if name == "native":
        return native("msda_fused", value, flat(shapes), reference, offsets, logits, mask)
    (value,) = lowered(value)
    if name == "reference" and whole.asked():
        answer: Tensor = whole.msda_fused(value, flat(shapes), reference, offsets, logits, mask)
        return answer
    return msda_fused_plain(value, shapes, reference, offsets, logits, mask, SAMPLERS[name])


def kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    form: Mode | None = None,
) -> Tensor:
    """Key-aware deformable attention (Lite DETR), (B, Q, M*D).

    query: (B, Q, M, D); key and value: (B, S, M, D), may be one tensor; reference, offsets, mask as in `msda_fused`;
    scale: of the dot products, 1/sqrt(D) by default. Samples outside keep logit 0 and their share of the softmax.
    """
    if not torch.compiler.is_exporting():
        checks.check_kda(query, key, value, shapes, reference, offsets, mask)
    scale = (value.shape[3] or 1) ** -0.5 if scale is None else scale
    name = backend(value.device, form, sizes_of(value, shapes)).name
    if name == "native":
        return native(
            "kda", query, None if key is value else key, value, flat(shapes), reference, offsets, mask, scale
        )
    if key is value:
        query, value = lowered(query, value)
        key = value
    else:
        query, key, value = lowered(query, key, value)
    if name == "reference" and whole.asked():
        own = None if key is value else key
        answer: Tensor = whole.kda(query, own, value, flat(shapes), reference, offsets, mask, scale)
        return answer
    return kda_plain(query, key, value, shapes, reference, offsets, mask, scale, SAMPLERS[name])


def native(name: str, *arguments: object) -> Tensor:
    answer: Tensor = getattr(torch.ops.detrcli_ops, name)(*arguments)
    return answer


def sizes_of(value: Tensor, shapes: Shapes) -> Sizes:
    pictures, _, heads, channels = value.shape
    # an exported graph may leave the number of pictures open, and a comparison would close it
    return Sizes(0 if torch.compiler.is_exporting() else pictures, heads, channels, len(shapes))


def flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would hand them to a matrix product; geometry is never lowered."""
    kind = tensors[0].device.type
    if not checks.autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
