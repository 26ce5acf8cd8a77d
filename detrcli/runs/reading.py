"""Reading files that anybody may have put there: regular ones only, never through a link, never without a bound."""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

MAX_DOCUMENT = 16 << 20  # bytes of a JSON document
MAX_SETTINGS = 1 << 20  # bytes of a TOML document
MAX_LINE = 1 << 16  # bytes of a line of metrics


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, else OSError: a pipe in its place would block, a link would lead elsewhere."""
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no regular file")
        yield file


def document(path: Path) -> dict[str, Any] | None:
    """The JSON table in a file; None where there is none that can be read."""
    try:
        with opened(path) as file:
            text = file.read(MAX_DOCUMENT + 1)
        return table(text) if len(text) <= MAX_DOCUMENT else None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def settings(path: Path) -> dict[str, Any] | None:
    """The TOML table in a file, likewise; dates become texts."""
    try:
        with opened(path) as file:
            text = file.read(MAX_SETTINGS + 1)
        if len(text) > MAX_SETTINGS:
            return None
        found: dict[str, Any] = printable(tomllib.loads(text.decode("utf-8", "replace"), parse_float=finite))
        return found
    except (OSError, ValueError, RecursionError):
        return None


def table(text: bytes) -> dict[str, Any] | None:
    """A JSON table whose numbers are finite and whose texts can be printed, else None."""
    try:
        value = json.loads(
            text.decode("utf-8", "replace"), parse_float=finite, parse_constant=lambda name: None
        )
        return printable(value) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def printable(value: Any) -> Any:
    """The value as JSON has it, with halves of surrogate pairs replaced in every text; no encoding has a place for them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value if isinstance(value, (bool, int, float, NoneType)) else str(value)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that end; what is cut short, or longer than any of ours, is given empty."""
    with opened(path) as file:
        while line := file.readline(MAX_LINE):
            whole = line.endswith(b"\n")
            yield line if whole else b""
            while not whole and (rest := file.readline(MAX_LINE)):
                whole = rest.endswith(b"\n")


def number(value: object) -> float | None:
    """A finite number as a float, None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number with hundreds of digits
        return None


def shown(value: object, limit: int = 120) -> str:
    """A text that a terminal or a page can show in one line: nothing that controls either, nothing endless."""
    text = str(value)[: limit + 1]
    seen = "".join(_visible(letter) for letter in text)
    return seen if len(seen) <= limit else seen[: limit - 1] + "…"


def _visible(letter: str) -> str:
    """Control letters, turned writing and the like as the mark of a letter that cannot be shown."""
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter)[0] == "C" else letter
