"""What the machine gives a run: memory, and room on the disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from detrcli.errors import DetrError
from detrcli.files import left_over


def peak_bytes(device: str) -> int:
    """The most memory that was held at once: of a GPU by this process, else by the process itself; 0 if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_reserved(device))
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def all_bytes(device: str) -> int:
    """What there is of it; 0 if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def enough_room(folder: Path, net: nn.Module, *, averaged: bool) -> None:
    """Three checkpoints must fit before a folder is made: the last, the one before, and the next while it is written. A run that
    goes on has some of them, and what a kill left of another, which is taken away."""
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    learned = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    kept = [*folder.glob("state*.pt"), *folder.glob("*.safetensors"), *left_over(folder)]
    needed = 3 * (size + 2 * learned + averaged * size) + 2 * size - sum(p.stat().st_size for p in kept)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DetrError(
            f"{folder} has {free / 2**30:.2f} GiB free; the run's checkpoints need {needed / 2**30:.2f}",
            hint="free some space, or choose another place with --out or DETR_RUNS",
        )
