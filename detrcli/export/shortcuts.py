"""Private doors of torch, through which models are traced and written sooner.

Behind another lock (a torch that has moved them) all is the same, and slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@contextmanager
def samples_have_shapes() -> Iterator[None]:
    """Tell torch the shape of what grid_sample answers: it would trace the whole interpolation to find it, each time.

    That is most of the time that deformable models take to trace, to write, and to load again as a pt2.
    """
    try:
        from torch._subclasses.fake_impls import FAST_OP_IMPLEMENTATIONS, register_fast_op_impl
    except ImportError:
        yield
        return
    sampler = torch.ops.aten.grid_sampler_2d.default

    def answer(mode: Any, image: Tensor, grid: Tensor, *options: Any) -> Tensor:
        with mode:
            return image.new_empty((*image.shape[:2], *grid.shape[1:3]))

    register_fast_op_impl(sampler)(answer)
    try:
        yield
    finally:
        FAST_OP_IMPLEMENTATIONS.pop(sampler, None)


@contextmanager
def types_without_running() -> Iterator[None]:
    """Let the exporter make types agree by what the tracing knows of each operator, where it would run them all once more."""
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        interpreter: Any = type_promotion._TypePromotionInterpreter
        rule_of, promote = type_promotion.get_type_promotion_rule, interpreter._maybe_promote_node
    except (ImportError, AttributeError):
        yield
        return
    run_node = interpreter.run_node

    def known(self: Any, node: Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(self, node)
        with self._set_current_node(node):
            if rule := rule_of(node, self.type_promotion_table):
                promote(self, node, rule)  # what this changes it runs itself
        return node.meta["val"]

    interpreter.run_node = known
    try:
        yield
    finally:
        interpreter.run_node = run_node
