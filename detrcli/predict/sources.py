"""From what a user names to single pictures: files, folders, globs, URLs, standard input, and in Python anything with pixels.

    photo.jpg  photos/  "photos/**/*.png"  https://…/photo.jpg      each name stands for one picture or many
    -                                                               standard input: one picture's bytes, or lines that
                                                                    are names or JSON objects with a "source"

Names are expanded lazily and in a fixed order (folders and globs sorted), so any number of pictures costs the same memory.
A folder that is looked into on the way down, by `recursive` or `**`, is entered once, however links lead back to it.
Expanding never fails: what cannot be read becomes an input that says why.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from detrcli.data.images import Source, open_image, read_image
from detrcli.errors import ImageError
from detrcli.predict.download import download, is_url

_ENDINGS = "jpg jpeg jpe jfif png bmp dib gif webp tif tiff ppm pgm pbm pnm avif jp2"
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split(" "))
_OTHER_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
LARGEST_FILE = 1 << 30  # bytes; no picture that can be decoded needs more
# Pictures that may begin with a whole line of text: where a line ends is up to a width or a size.
_TEXT_FIRST = re.compile(
    rb"P[1-7Ff]\s+(\d|#|$)"  # PNM
    rb"|GIF8[79]a.{0,6}\n"
    rb"|RIFF(.{0,3}\n|.{4}WEBP)"
    rb"|BM.{0,3}\n",
    re.DOTALL,
)
Folder = tuple[int, int]  # what all names of a folder have in common


@dataclass(frozen=True, slots=True)
class Input:
    """One picture to be read, or the reason why there is none."""

    name: str  # as the user may recognise it
    source: Source | ImageError

    def read(self) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels (3, H, W) uint8 as a viewer shows them, and what is peculiar about the file, in words."""
        if isinstance(self.source, ImageError):
            raise self.source
        if not isinstance(self.source, (str, os.PathLike, bytes)):
            return read_image(self.source, name=self.name), ()
        if isinstance(self.source, bytes):
            data = self.source
        elif is_url(os.fspath(self.source)):
            data = download(os.fspath(self.source))
        else:
            data = _file_bytes(Path(self.source), self.name)
        return read_image(data, name=self.name), _peculiar(data, self.name)


def expand(
    sources: Source | Iterable[Source], *, recursive: bool = False, leave_out: Iterable[Path] = ()
) -> Iterator[Input]:
    """Every picture that the sources name, in order. Folders `leave_out` are entered only when one of them is named."""
    if isinstance(sources, (str, bytes, os.PathLike, Image.Image, np.ndarray, Tensor)):
        sources = [sources]
    closed = _folders(leave_out)
    for number, source in enumerate(sources):
        if isinstance(source, str) and source == "-":
            yield from _piped(_stdin(), recursive, closed)
        elif isinstance(source, (str, os.PathLike)):
            yield from _named(os.fspath(source), recursive, closed)
        else:
            yield Input(_name_of(source, number), _own(source))


def _own(source: Source) -> Source:
    """Pixels that nobody else writes to: a camera's loop fills one buffer again and again, and pictures are read ahead."""
    if isinstance(source, np.ndarray):
        return source.copy()
    return source.clone() if isinstance(source, Tensor) else source


def _name_of(source: Source, number: int) -> str:
    name = getattr(source, "filename", "") or ""
    return name if isinstance(name, str) and name else f"{type(source).__name__.lower()}-{number + 1}"


def _named(name: str, recursive: bool, closed: set[Folder]) -> Iterator[Input]:
    if is_url(name):
        yield Input(_readable(name), name)
    elif os.path.isdir(name):
        yield from _folder(Path(name), recursive, closed)
    elif not os.path.lexists(name) and _OTHER_SCHEME.match(name):
        name = _readable(name)
        yield Input(name, ImageError(f"{name}: of addresses only http and https are read"))
    elif not os.path.lexists(name) and glob.has_magic(name):
        yield from _glob(name, closed)
    else:
        yield Input(_readable(name), name)


def _glob(pattern: str, closed: set[Folder]) -> Iterator[Input]:
    try:
        matches = sorted({path for path in _matches(pattern, closed) if not os.path.isdir(path)})
    except ValueError:  # letters that no file name can have
        matches = []
    if not matches:
        name = _readable(pattern)
        yield Input(name, ImageError(f"{name}: no file matches"))
    yield from (Input(_readable(path), path) for path in matches)


def _matches(pattern: str, closed: set[Folder]) -> Iterator[str]:
    """What `glob.glob` finds, whose own `**` follows links in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    place = parts.index("**")
    rest = parts[place + 1 :] or ("*",)
    for top in glob.glob(str(Path(*parts[:place]))):
        for folder in _below(Path(top), closed - _folders([top])):
            yield from _matches(str(Path(glob.escape(str(folder)), *rest)), closed)


def _below(folder: Path, closed: set[Folder]) -> Iterator[Path]:
    """What `**` stands for: the folder and all below it but hidden ones."""
    try:
        entries = _enter(folder, closed)
    except OSError:
        return
    if entries:
        yield folder
    for entry in entries:
        if not entry.name.startswith(".") and os.path.isdir(entry):
            yield from _below(entry, closed)


def _folder(folder: Path, recursive: bool, closed: set[Folder]) -> Iterator[Input]:
    """Pictures by their suffix."""
    empty = True
    for found in _walk(folder, recursive, closed - _folders([folder])):
        empty = False
        yield found
    if empty:
        where = "in it or below it" if recursive else "in it (--recursive looks below)"
        name = _readable(str(folder))
        yield Input(name, ImageError(f"{name}: no picture {where}"))


def _walk(folder: Path, recursive: bool, closed: set[Folder]) -> Iterator[Input]:
    try:
        entries = _enter(folder, closed)
    except OSError as error:
        name = _readable(str(folder))
        yield Input(name, ImageError(f"{name}: {(error.strerror or str(error)).lower()}"))
        return
    for entry in entries:
        if os.path.isdir(entry):  # never fails: what cannot be looked at is told when it is opened
            if recursive:
                yield from _walk(entry, recursive, closed)
        elif entry.suffix.lower() in SUFFIXES:
            yield Input(_readable(str(entry)), entry)


def _enter(folder: Path, closed: set[Folder]) -> list[Path]:
    """What is in a folder, sorted, and nothing in one that is closed, as it is from now on."""
    this, entries = _folders([folder]), sorted(folder.iterdir())
    if this <= closed:
        return []
    closed |= this
    return entries


def _folders(paths: Iterable[str | Path]) -> set[Folder]:
    """Those of the paths that are there."""
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return found


def _stdin() -> BinaryIO:
    """Standard input by a reader of our own: Python aborts when it ends while a thread still waits in that of `sys.stdin`."""
    try:
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    except (OSError, AttributeError):  # not of this process
        return sys.stdin.buffer


def _piped(stream: BinaryIO, recursive: bool, closed: set[Folder]) -> Iterator[Input]:
    """Standard input: a picture when its beginning is that of one or no text, else one name a line."""
    first = stream.readline()
    if _is_binary(first):
        yield Input("stdin", first + stream.read(LARGEST_FILE))
        return
    while first:
        line = first.decode("utf-8", "surrogateescape").strip("\r\n")
        if line.strip():
            yield from _line(line, recursive, closed)
        first = stream.readline()


def _is_binary(line: bytes) -> bool:
    try:
        if b"\0" in line or any(ord(c) < 9 or 13 < ord(c) < 32 for c in line.decode()):
            return True
        unlike_a_name = _TEXT_FIRST.match(line) is not None
    except UnicodeDecodeError:
        unlike_a_name = True
    return unlike_a_name and not os.path.lexists(line.rstrip(b"\r\n"))


def _line(line: str, recursive: bool, closed: set[Folder]) -> Iterator[Input]:
    if not line.lstrip().startswith("{"):
        yield from _named(line, recursive, closed)
        return
    try:
        source = json.loads(line)["source"]
        if not isinstance(source, str) or source == "-":
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        name = _readable(line[:80])
        yield Input(name, ImageError(f'{name}: a JSON line needs a "source", the name of a picture'))
        return
    yield from _named(source, recursive, closed)


def _readable(name: str) -> str:
    """A file's name as text that can be written anywhere, even when its bytes are no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def _file_bytes(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{name}: {reason}") from None
    if len(data) > LARGEST_FILE:
        raise ImageError(f"{name}: larger than {LARGEST_FILE >> 20} MiB")
    return data


def _peculiar(data: bytes, name: str) -> tuple[str, ...]:
    try:
        frames = getattr(open_image(data, name), "n_frames", 1)
    except Exception:  # counting frames reads on; the first one, which counts, was read already
        return ()
    return (f"first of {frames} frames",) if frames > 1 else ()
