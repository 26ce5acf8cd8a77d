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

    def msda(value: Any, sizes: Any, locations: Any, weights: Any) -> Any:
        samples = sample(value, sizes, locations)
        weights = op.Unsqueeze(levels_first(weights), ints(2))  # (L, N, 1, Q, P)
        return add_up([op.Mul(x, level(weights, i)) for i, x in enumerate(samples)], value)

    def kda(query: Any, key: Any, value: Any, sizes: Any, locations: Any, scale: float) -> Any:
        values = sample(value, sizes, locations)
        keys = values if key is None else sample(key, sizes, locations)
        asked = op.Mul(op.Cast(query, to=FLOAT), op.Constant(value_float=scale))
        shape = op.Concat(ints(-1, query.shape[3]), op.Shape(query, start=1, end=2), ints(1), axis=0)
        asked = op.Reshape(op.Transpose(asked, perm=[0, 2, 3, 1]), shape)  # (N, D, Q, 1)
        logits = [op.ReduceSum(op.Mul(asked, x), ints(1)) for x in keys]  # (N, 1, Q, P)
        weights, points = op.Softmax(op.Concat(*logits, axis=3), axis=3), locations.shape[4]
        parts = [
            op.Slice(weights, ints(i * points), ints((i + 1) * points), ints(3)) for i in range(len(keys))
        ]
        return add_up([op.Mul(x, part) for x, part in zip(values, parts, strict=True)], value)

    def sample(rows: Any, sizes: Any, locations: Any) -> list[Any]:
        """What rows (B, S, M, D) hold at locations (B, Q, M, L, P, 2), by level."""
        table, sizes = op.Transpose(op.Cast(rows, to=FLOAT), perm=[0, 2, 3, 1]), in_one(sizes)  # (B, M, D, S)
        grids, found, first = grid(levels_first(locations)), [], ints(0)
        for i in range(locations.shape[3]):
            size = op.Slice(sizes, ints(2 * i), ints(2 * i + 2))
            after = op.Add(first, op.ReduceProd(size))
            shape = op.Concat(ints(-1, rows.shape[3]), size, axis=0)
            image = op.Reshape(op.Slice(table, first, after, ints(3)), shape)  # (N, D, H, W)
            found.append(op.GridSample(image, level(grids, i), mode="linear", padding_mode="zeros"))
            first = after
        return found

    def grid(locations: Any) -> Any:
        """From 0..1 to -1..1; what is no number lies outside, as in `sample_levels`."""
        least, most = op.Constant(value_float=FAR_OUTSIDE), op.Constant(value_float=1 - FAR_OUTSIDE)
        inside = op.Clip(op.Where(op.IsNaN(locations), least, locations), least, most)
        return op.Sub(op.Mul(inside, op.Constant(value_float=2.0)), op.Constant(value_float=1.0))

    def levels_first(x: Any) -> Any:
        """(B, Q, M, L, P, ...) as (L, N, Q, P, ...)"""
        rest = list(range(4, len(x.shape)))
        shape = op.Concat(ints(x.shape[3], -1), op.Shape(x, start=1, end=2), op.Shape(x, start=4), axis=0)
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

    return {whole.msda._opoverload: msda, whole.kda._opoverload: kda}
