"""pt2: the graph as torch itself saves it, any operator of torch in it, the description beside it in the same archive."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from detrcli.export.description import Description

ENTRY = "detrcli.json"


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    whole = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, whole, extra_files={ENTRY: description.dumps()})
    path.write_bytes(whole.getbuffer())
