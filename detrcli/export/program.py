"""pt2: the graph as torch itself saves it, any operator of torch in it, the description beside it in the same archive."""

from __future__ import annotations

import functools
import io
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO
from unittest.mock import patch

import sympy.printing.repr
import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter
from torch.fx import GraphModule

from detrcli.export.description import Description
from detrcli.export.vetting import DESCRIPTION, PROGRAM, vetted


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    only_what_runs(program)
    whole = io.BytesIO()  # on a full disk torch's own writer ends the process
    with formulas_written_once():
        torch.export.save(program, whole, extra_files={DESCRIPTION: description.dumps()})
    for _ in vetted(whole, path.name):
        pass  # what would not be run from the file is said before there is one
    path.write_bytes(whole.getbuffer())


def only_what_runs(program: ExportedProgram) -> None:
    """Without inputs to try it with, which torch would unpickle, and without where each node came from, with paths of this machine."""
    program.example_inputs = None
    for graph in program.graph_module.modules():
        if isinstance(graph, GraphModule):
            for node in graph.graph.nodes:
                node.meta = {name: value for name, value in node.meta.items() if name == "val"}


def formulas_written_once() -> AbstractContextManager[object]:
    """Inside, what torch writes of a size is remembered: of ten thousand sizes of results some two hundred are different."""
    return patch.object(
        sympy.printing.repr, "srepr", functools.lru_cache(maxsize=1024, typed=True)(sympy.srepr)
    )


def read(file: IO[bytes], name: object) -> ExportedProgram:
    """The program in a file that is called `name`: of its parts, those that may be loaded, in an archive of their own."""
    parts = io.BytesIO()
    with PT2ArchiveWriter(parts) as archive:
        for part, content in vetted(file, name):
            archive.write_bytes(part, with_traced_sizes(content) if part == PROGRAM else content)
    parts.seek(0)
    with logged() as reasons:
        try:
            program = torch.export.load(parts)
        except RuntimeError as error:
            raise (reasons or [error])[0] from None
    program.example_inputs = ((torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1)), {})  # or torch checks no sizes
    return program


def with_traced_sizes(document: bytes) -> bytes:
    """The program with the sizes of results in between as they were when it was traced, which nothing that runs it reads.

    They are formulas, some ten thousand where a backbone has windows, and torch takes minutes to read as many.
    """
    program = json.loads(document)
    graph = program["graph_module"]["graph"]
    inputs = {given["as_tensor"]["name"] for given in graph["inputs"] if "as_tensor" in given}
    for name, result in graph["tensor_values"].items():
        if name not in inputs:
            for sizes in (result["sizes"], result["strides"]):
                sizes[:] = [size.get("as_expr", {}).get("hint") or size for size in sizes]
    return json.dumps(program).encode()


@contextmanager
def logged() -> Iterator[list[BaseException]]:
    """The errors that torch logs, with a traceback, where it raises others that say to look there."""
    reasons: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        reasons.extend(error for error in (record.exc_info or ()) if isinstance(error, BaseException))
        return False

    logger = logging.getLogger("torch.export")
    logger.addFilter(keep)
    try:
        yield reasons
    finally:
        logger.removeFilter(keep)
