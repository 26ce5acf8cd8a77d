"""Gradients: each operator's backward is an operator too, so compiled graphs stay whole. First derivatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ops = torch.ops.detrcli_ops
Inputs = tuple[Any, ...]
Grads = tuple[Tensor | None, ...]


def keep(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    """Saves the tensors of a call for backward and remembers everything else."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def kept(ctx: Any) -> list[Any]:
    return [
        tensor if tensor is not None else other
        for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
    ]


def deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def given(need: bool, grad: Tensor) -> Tensor | None:
    return grad if need else None


def msda_backward(ctx: Any, grad: Tensor) -> Grads:
    value, _, locations, weights = ctx.needs_input_grad
    d_value, d_locations, d_weights = ops.msda_backward(
        grad, *kept(ctx), value, locations or weights, deterministic()
    )
    return given(value, d_value), None, given(locations, d_locations), given(weights, d_weights)


def msda_fused_backward(ctx: Any, grad: Tensor) -> Grads:
    value, _, reference, offsets, logits, _ = ctx.needs_input_grad
    d_value, d_reference, d_offsets, d_logits = ops.msda_fused_backward(
        grad, *kept(ctx), value, offsets or logits, reference, deterministic()
    )
    return (
        given(value, d_value),
        None,
        given(reference, d_reference),
        given(offsets, d_offsets),
        given(logits, d_logits),
        None,
    )


def kda_backward(ctx: Any, grad: Tensor) -> Grads:
    query, key, value, _, reference, offsets, _, _ = ctx.needs_input_grad
    d_query, d_key, d_value, d_reference, d_offsets = ops.kda_backward(
        grad, *kept(ctx), key or value, query or offsets, reference, deterministic()
    )
    return (
        given(query, d_query),
        given(key, d_key),
        given(value, d_value),
        None,
        given(reference, d_reference),
        given(offsets, d_offsets),
        None,
        None,
    )


def no_second_derivative(ctx: Any, *grads: Tensor) -> Grads:
    raise RuntimeError("detrcli_ops has first derivatives only; set DETR_OPS=reference for second ones")


torch.library.register_autograd("detrcli_ops::msda", msda_backward, setup_context=keep)
torch.library.register_autograd("detrcli_ops::msda_fused", msda_fused_backward, setup_context=keep)
torch.library.register_autograd("detrcli_ops::kda", kda_backward, setup_context=keep)

for name in ("msda", "msda_fused", "kda"):
    torch.library.register_autograd(f"detrcli_ops::{name}_backward", no_second_derivative)
