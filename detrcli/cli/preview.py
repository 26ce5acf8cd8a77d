"""A small picture in the terminal, where the terminal can show one; nothing elsewhere."""

from __future__ import annotations

import base64
import os
import sys
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from detrcli.cli import console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from detrcli.predict.result import Result

Way = Literal["kitty", "iterm", "blocks"]

COLUMNS = 60  # of the terminal that a preview takes
CHUNK = 4096  # bytes of base64 in one command of the kitty protocol


def way_of(environment: Mapping[str, str]) -> Way | None:
    """How this terminal shows pictures, as far as it says."""
    if "NO_COLOR" in environment or environment.get("TERM", "dumb") == "dumb" or "TMUX" in environment:
        return None
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "vscode", "mintty"):
        return "iterm"
    return "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else None


def show(result: Result) -> None:
    """Draw a result on stderr, if that is a terminal."""
    way = way_of(os.environ)
    if way is not None and sys.stderr.isatty() and not console.settings.quiet and not console.settings.json:
        console.note(encode(result.draw(), way))


def encode(picture: Image, way: Way) -> str:
    """The text that makes a terminal draw the picture."""
    small = picture.copy()
    small.thumbnail((COLUMNS, 2 * COLUMNS) if way == "blocks" else (640, 640))
    if way == "blocks":
        return _blocks(small)
    file = BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    if way == "iterm":
        return f"\033]1337;File=inline=1;width={COLUMNS};preserveAspectRatio=1:{data}\a"
    parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    last = len(parts) - 1
    head = f"a=T,f=100,c={COLUMNS},"
    return "".join(f"\033_G{'' if i else head}m={int(i < last)};{part}\033\\" for i, part in enumerate(parts))


def _blocks(picture: Image) -> str:
    """Two pixels a character: the upper half block has a colour of its own and one behind it."""
    rows = []
    for y in range(0, picture.height - 1, 2):
        cells = []
        for x in range(picture.width):
            upper, lower = (picture.getpixel((x, row)) for row in (y, y + 1))
            cells.append(f"\033[38;2;{_rgb(upper)};48;2;{_rgb(lower)}m▀")
        rows.append("".join(cells) + "\033[0m")
    return "\n".join(rows)


def _rgb(pixel: object) -> str:
    assert isinstance(pixel, tuple)  # an RGB picture's pixels are
    return ";".join(str(value) for value in pixel[:3])
