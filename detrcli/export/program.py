"""pt2: the graph as torch itself saves it, any operator of torch in it, the description beside it in the same archive."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from detrcli.export.description import Description

ENTRY = "detrcli.json"


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    forget_sources(program)
    whole = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, whole, extra_files={ENTRY: description.dumps()})
    path.write_bytes(whole.getbuffer())


def forget_sources(program: ExportedProgram) -> None:
    """Without the lines of source that each node came from, with paths of this machine."""
    for graph in program.graph_module.modules():
        if isinstance(graph, GraphModule):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)
