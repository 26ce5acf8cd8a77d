"""pt2: the graph as torch itself saves it, any operator of torch in it, the description beside it in the same archive."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from detrcli.export.description import Description

ENTRY = "detrcli.json"


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={ENTRY: description.dumps()})
