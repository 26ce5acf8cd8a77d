"""Deformable attention in standard ONNX operators: what the writer puts in the place of `detrcli.ops.whole`'s operators.

Samples of a level are (N, D, Q, P), N = B*M, as GridSample answers; places and weights have the level in front. Arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from detrcli.ops import whole
from detrcli.ops.msda import FAR_OUTSIDE

FLOAT = 1  # ONNX's number of float32


def translations(op: Any) -> dict[Any, Callable[..., Any]]:
    """Both operators, by what they are in the opset `op`."""

    def msda_fused(value: Any, sizes: Any, reference: Any, offsets: Any, logits: Any, mask: Any) -> Any:
        samples = sample(value, in_one(sizes), reference, offsets, mask)
        tail = offsets.shape[3:5]
        weights = op.Reshape(op.Softmax(op.Cast(logits, to=FLOAT), axis=3), ints(0, 0, 0, *tail))
        weights = op.Unsqueeze(levels_first(weights, tail), ints(2))  # (L, N, 1, Q, P)
        return add_up([op.Mul(x, level(weights, i)) for i, x in enumerate(samples)], value)

    def kda(
        query: Any, key: Any, value: Any, sizes: Any, reference: Any, offsets: Any, mask: Any, scale: float
    ) -> Any:
        sizes, points = in_one(sizes), offsets.shape[4]
        values = sample(value, sizes, reference, offsets, mask)
        keys = values if key is None else sample(key, sizes, reference, offsets, mask)
        asked = op.Mul(op.Cast(query, to=FLOAT), op.Constant(value_float=scale))
        shape = op.Concat(ints(-1, query.shape[3]), op.Shape(query, start=1, end=2), ints(1), axis=0)
        asked = op.Reshape(op.Transpose(asked, perm=[0, 2, 3, 1]), shape)  # (N, D, Q, 1)
        logits = [op.ReduceSum(op.Mul(asked, x), ints(1)) for x in keys]  # (N, 1, Q, P)
        weights = op.Softmax(op.Concat(*logits, axis=3), axis=3)
        parts = [
            op.Slice(weights, ints(i * points), ints((i + 1) * points), ints(3)) for i in range(len(keys))
        ]
        return add_up([op.Mul(x, part) for x, part in zip(values, parts, strict=True)], value)

    def sample(rows: Any, sizes: Any, reference: Any, offsets: Any, mask: Any) -> list[Any]:
        """What rows (B, S, M, D) hold where the queries look, by level; padding (B, S) holds zeros."""
        depth, (levels, points) = rows.shape[3], offsets.shape[3:5]
        grids = levels_first(grid(locations(sizes, reference, offsets)), (levels, points, 2))
        rows = op.Cast(rows, to=FLOAT)
        if mask is not None:
            rows = op.Where(op.Unsqueeze(mask, ints(2, 3)), op.Constant(value_float=0.0), rows)
        table, found, first = op.Transpose(rows, perm=[0, 2, 3, 1]), [], ints(0)  # (B, M, D, S)
        for i in range(levels):
            size = op.Slice(sizes, ints(2 * i), ints(2 * i + 2))
            after = op.Add(first, op.ReduceProd(size))
            shape = op.Concat(ints(-1, depth), size, axis=0)
            image = op.Reshape(op.Slice(table, first, after, ints(3)), shape)  # (N, D, H, W)
            found.append(op.GridSample(image, level(grids, i), mode="linear", padding_mode="zeros"))
            first = after
        return found

    def locations(sizes: Any, reference: Any, offsets: Any) -> Any:
        """`sampling_locations`, (B, Q, M, L, P, 2)"""
        levels, points = offsets.shape[3:5]
        boxes = reference.shape[3] == 4
        offsets, anchor = op.Cast(offsets, to=FLOAT), op.Unsqueeze(op.Cast(reference, to=FLOAT), ints(2, 4))
        if boxes:
            centre, extent = (op.Slice(anchor, ints(a), ints(a + 2), ints(5)) for a in (0, 2))
            return op.Add(centre, op.Mul(offsets, op.Mul(extent, op.Constant(value_float=0.5 / points))))
        across = op.Gather(op.Reshape(sizes, ints(levels, 1, 2)), ints(1, 0), axis=2)  # width, height
        return op.Add(anchor, op.Div(offsets, op.Cast(op.Max(across, ints(1)), to=FLOAT)))

    def grid(locations: Any) -> Any:
        """From 0..1 to -1..1; what is no number lies outside, as in `sample_levels`."""
        least, most = op.Constant(value_float=FAR_OUTSIDE), op.Constant(value_float=1 - FAR_OUTSIDE)
        inside = op.Clip(op.Where(op.IsNaN(locations), least, locations), least, most)
        return op.Sub(op.Mul(inside, op.Constant(value_float=2.0)), op.Constant(value_float=1.0))

    def levels_first(x: Any, tail: Sequence[int]) -> Any:
        """(B, Q, M, *tail) as (L, N, Q, P, ...); tail: L, P, ..."""
        rest = list(range(4, 3 + len(tail)))
        shape = op.Concat(ints(tail[0], -1), op.Shape(x, start=1, end=2), ints(*tail[1:]), axis=0)
        return op.Reshape(op.Transpose(x, perm=[3, 0, 2, 1, *rest]), shape)

    def level(x: Any, index: int) -> Any:
        return op.Gather(x, op.Constant(value_int=index), axis=0)

    def add_up(products: Sequence[Any], value: Any) -> Any:
        """All points of all levels (N, D, Q, P), as (B, Q, M*D) in the type of value (B, S, M, D)."""
        total = reduce(op.Add, [op.ReduceSum(x, ints(3), keepdims=0) for x in products])
        shape = op.Concat(op.Shape(value, start=0, end=1), ints(value.shape[2] * value.shape[3], -1), axis=0)
        return op.CastLike(op.Transpose(op.Reshape(total, shape), perm=[0, 2, 1]), value)

    def in_one(numbers: Any) -> Any:
        """Several sizes, some of them known, as one tensor."""
        if not isinstance(numbers, Sequence):
            return numbers
        known = [ints(n) if isinstance(n, int) else op.Reshape(n, ints(1)) for n in numbers]
        return op.Concat(*known, axis=0)

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    return {whole.msda_fused._opoverload: msda_fused, whole.kda._opoverload: kda}
