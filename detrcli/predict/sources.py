"""From what a user names to single pictures: files, folders, globs, and in Python anything that holds pixels.

Names are expanded lazily and in a fixed order (folders and globs sorted), so any number of pictures costs the same memory.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from detrcli.errors import ImageError

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Tensor"

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
    ]
)


@dataclass(frozen=True, slots=True)
class Input:
    """One picture to be read, or the reason why there is none."""

    name: str  # as the user may recognise it
    source: Source | ImageError


def expand(sources: Source | Iterable[Source], *, recursive: bool = False) -> Iterator[Input]:
    """Every picture that the sources name, in order."""
    if isinstance(sources, (str, bytes, os.PathLike, Image.Image, np.ndarray, Tensor)):
        sources = [sources]
    for number, source in enumerate(sources):
        if isinstance(source, (str, os.PathLike)):
            yield from _named(os.fspath(source), recursive)
        else:
            yield Input(_name_of(source, number), source)


def _name_of(source: Source, number: int) -> str:
    name = getattr(source, "filename", "") or ""
    return name if isinstance(name, str) and name else f"{type(source).__name__.lower()}-{number + 1}"


def _named(name: str, recursive: bool) -> Iterator[Input]:
    if os.path.isdir(name):
        yield from _folder(Path(name), recursive)
    elif not os.path.lexists(name) and glob.has_magic(name):
        yield from _glob(name)
    else:
        yield Input(name, name)


def _glob(pattern: str) -> Iterator[Input]:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not matches:
        yield Input(pattern, ImageError(f"{pattern}: no file matches"))
    yield from (Input(path, path) for path in matches)


def _folder(folder: Path, recursive: bool) -> Iterator[Input]:
    """Pictures by their suffix; a folder that links back to one above it is entered once."""
    empty = True
    for path in _walk(folder, recursive, set()):
        empty = False
        yield Input(str(path), path)
    if empty:
        where = "it or below it" if recursive else "it (--recursive looks below)"
        yield Input(str(folder), ImageError(f"{folder}: no picture in {where}"))


def _walk(folder: Path, recursive: bool, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.is_dir():
            if recursive:
                yield from _walk(entry, recursive, seen)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry
