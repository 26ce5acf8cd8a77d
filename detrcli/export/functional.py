"""A traced program without in-place operators, as the ONNX exporter wants it.

The exporter gets there by tracing the program twice more, nearly half of the time that the export of a large model takes. In a
detector few operators stand in the way, and they are rewritten here, each where it stands; what is not known to be safe is left
to the exporter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# nothing where a tensor is already what they make of it
_CONVERSIONS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.detach.default,
    aten.detach_.default,
}
_SYNONYMS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.adaptive_avg_pool2d.default: aten._adaptive_avg_pool2d.default,
}


def ready(program: ExportedProgram) -> ExportedProgram:
    """The same program, that the exporter does not trace again unless there is something left to rewrite."""
    rewrite(program.graph)
    program.graph_module.recompile()
    for spec, answer in zip(
        program.graph_signature.output_specs, program.graph.output_node().args[0], strict=True
    ):
        spec.arg.name = answer.name
    quick = copy.copy(program)

    def run_decompositions(table: Mapping[Any, Any] | None = None) -> ExportedProgram:
        if table is not None and all(_is_plain(node, table) for node in program.graph.nodes):
            return quick
        done: ExportedProgram = program.run_decompositions(None if table is None else dict(table))
        return done

    quick.run_decompositions = run_decompositions
    return quick


def rewrite(graph: torch.fx.Graph) -> None:
    """Each operator in place as the one that answers instead; what only hands a tensor on, gone."""
    seen: dict[Node, frozenset[int]] = {}
    for node in list(graph.nodes):
        if (same := _handed_on(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            continue
        memory, node.target = _memory(node), _SYNONYMS.get(node.target, node.target)
        if node.target in _CONVERSIONS:
            dtype = node.meta["val"].dtype
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": dtype}
        if node.target is aten.chunk.default:  # the exporter would make no list of a single part
            axis = node.args[2] if len(node.args) > 2 else 0
            if isinstance(size := node.meta["val"][0].shape[axis], int):
                node.target, node.args = aten.split.Tensor, (node.args[0], size, axis)
        if (twin := _answering(node.target)) is not None and _keeps_type(node) and _alone(node.args[0], seen):
            node.target, changed = twin, node.args[0]
            for user in [user for user in changed.users if user not in seen and user is not node]:
                user.replace_input_with(changed, node)
        seen[node] = memory
    graph.eliminate_dead_code()


def _handed_on(node: Node) -> Node | None:
    """The node whose answer this one is, unchanged."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _CONVERSIONS and _memory(node) == _memory(source):
        return source
    if node.target is aten.dropout.default and not node.args[2]:
        return source
    return None


def _answering(operator: Any) -> OpOverload | None:
    """aten.relu for aten.relu_, and so on."""
    if not isinstance(operator, OpOverload) or not operator._schema.is_mutable:
        return None
    packet = getattr(aten, operator._schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin = getattr(packet, operator._overloadname, None)
    return twin if isinstance(twin, OpOverload) and not twin._schema.is_mutable else None


def _keeps_type(node: Node) -> bool:
    """Whether the answer has the type of the tensor that is changed; in place it has it anyhow."""
    values = (x.meta.get("val") for x in node.all_input_nodes)
    changed, *others = (x.dtype for x in values if isinstance(x, Tensor))
    return all(torch.promote_types(changed, other) == changed for other in others)


def _alone(changed: Any, seen: Mapping[Node, frozenset[int]]) -> bool:
    """Whether only who reads this tensor itself, and no part or view of it, will see that it is changed."""
    if changed not in seen:
        return False
    sharing = [node for node, memory in seen.items() if memory & seen[changed]]
    return all(
        node.op == "call_function" and (node is changed or all(user in seen for user in node.users))
        for node in sharing
    )


def _memory(node: Node) -> frozenset[int]:
    """What the tensors of a node are kept in."""
    values = tree_leaves(node.meta.get("val"))
    return frozenset(x.untyped_storage()._cdata for x in values if isinstance(x, Tensor))


def _is_plain(node: Node, table: Mapping[Any, Any]) -> bool:
    """Whether the exporter has to look no deeper into an operator."""
    operator: Any = node.target
    if isinstance(operator, OpOverload):
        return operator not in table and not operator._schema.is_mutable
    return node.op != "call_function" or not isinstance(operator, HigherOrderOperator)
