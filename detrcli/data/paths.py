"""File names that come from a data set: joined to its folder only where they stay inside it."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

from detrcli.errors import DataError


def why_outside(name: str) -> str | None:
    """Why a name from a file must not be joined to a folder, or None where it may."""
    if not name.strip():
        return "an empty name"
    if "\0" in name:
        return "a NUL character"
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        return "an absolute path"
    depth = 0
    for part in name.replace("\\", "/").split("/"):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            return "a path that climbs out of its folder"
    return None


def inside(root: Path, name: str) -> Path:
    """`root / name`, or a DataError where that, links followed, is not inside `root`."""
    reason = why_outside(name)
    path = root / name if reason is None else root
    if reason is None and not os.path.realpath(path).startswith(os.path.realpath(root) + os.sep):
        reason = "a link that leaves its folder"
    if reason is not None:
        raise DataError(f"{name!r} in {root}: refused, {reason}")
    return path
