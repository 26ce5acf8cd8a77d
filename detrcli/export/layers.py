"""Linear layers, norms, products of matrices and running sums as one operator of torch each, for a writer that spells them out.

torch takes them apart to find the shape of what they answer, every time it meets them; where sizes are symbols of many terms, as
behind a Swin backbone, that was a third of the time that a model took to trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
CUMSUMS = (torch.cumsum, Tensor.cumsum)


class AsOne(TorchFunctionMode):
    """Inside the block the layers are the operators below."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and len(args) > 1 and args[1].ndim == 2:
            return linear(*args, **kwargs)
        if function is F.layer_norm:
            return layer_norm(*args, **kwargs)
        if function in MATMULS and len(args) == 2 and min(x.ndim for x in args) > 1:
            return matmul(*args)
        if function in CUMSUMS and len(args) == 2 and not kwargs and args[0].is_floating_point():
            return cumsum(*args)
        return function(*args, **kwargs)


@torch.library.custom_op("detrcli::linear", mutates_args=())
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


@linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.custom_op("detrcli::layer_norm", mutates_args=())
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(input, list(normalized_shape), weight, bias, eps)


@layer_norm.register_fake
def _(input: Tensor, *options: object) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.custom_op("detrcli::matmul", mutates_args=())
def matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input, other)


@matmul.register_fake
def _(input: Tensor, other: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])  # type: ignore[no-untyped-call]
    return input.new_empty((*batch, input.shape[-2], other.shape[-1]))


@torch.library.custom_op("detrcli::cumsum", mutates_args=())
def cumsum(input: Tensor, dim: int) -> Tensor:
    return torch.cumsum(input, dim)


@cumsum.register_fake
def _(input: Tensor, dim: int) -> Tensor:
    return input.new_empty(input.shape)


def translations(op: Any) -> dict[Any, Callable[..., Any]]:
    """The operators, by what they are in the opset `op`."""

    def linear_(x: Any, weight: Any, bias: Any = None) -> Any:
        answer = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return answer if bias is None else op.Add(answer, bias)

    def layer_norm_(
        x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Any:
        if weight is None:
            ones = op.Constant(value_floats=[1.0] * shape[-1])
            weight = op.CastLike(op.Expand(ones, op.Constant(value_ints=list(shape))), x)
        normed, _, _ = op.LayerNormalization(x, weight, bias, axis=-len(shape), epsilon=eps)
        return normed

    def matmul_(x: Any, y: Any) -> Any:
        return op.MatMul(x, y)

    def cumsum_(x: Any, dim: int) -> Any:
        return op.CumSum(x, op.Constant(value_int=dim))

    return {
        linear._opoverload: linear_,
        layer_norm._opoverload: layer_norm_,
        matmul._opoverload: matmul_,
        cumsum._opoverload: cumsum_,
    }
