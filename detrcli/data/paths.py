"""File names that come from a data set: joined to its folder only where they stay inside it."""

from __future__ import annotations

import functools
import os
from pathlib import Path, PureWindowsPath

from detrcli.errors import DataError


def why_outside(name: str) -> str | None:
    """Why a name from a file must not be joined to a folder, or None where it may."""
    if not name.strip():
        return "an empty name"
    if "\0" in name:
        return "a NUL character"
    if not _encodable(name):
        return "half a letter, which no file's name has"
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        return "an absolute path"
    depth = 0
    for part in name.replace("\\", "/").split("/"):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            return "a path that climbs out of its folder"
    return None


def inside(root: Path, name: str) -> Path:
    """`root / name`, or a DataError where that, links followed, is not inside `root`.

    `DETR_FOLLOW_LINKS=1` allows links: for data sets that are made of links to a store of files.
    """
    reason = why_outside(name)
    if reason is not None:
        raise DataError(f"{name!r} in {root}: refused, {reason}")
    path = root / name
    if os.environ.get("DETR_FOLLOW_LINKS") != "1" and not os.path.realpath(path).startswith(
        _real(os.path.abspath(root))
    ):
        raise DataError(
            f"{name!r} in {root}: refused, a link that leaves its folder",
            hint="set DETR_FOLLOW_LINKS=1 if you trust the links of this data set",
        )
    return path


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _real(root: str) -> str:
    return os.path.realpath(root).rstrip(os.sep) + os.sep
