"""A contact sheet: many pictures on one, each with its name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _CAPTION = 8, 20


def sheet(
    pictures: Sequence[tuple[str, Image.Image]], *, columns: int | None = None, cell: int = 320
) -> Image.Image:
    """`(name, picture)` pairs in rows, each fitted into a square cell above its name."""
    columns = columns or max(1, math.ceil(math.sqrt(len(pictures))))
    rows = max(1, -(-len(pictures) // columns))
    step_x, step_y = cell + _GAP, cell + _CAPTION + _GAP
    canvas = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for place, (name, picture) in enumerate(pictures):
        left, top = _GAP + place % columns * step_x, _GAP + place // columns * step_y
        fitted = _fit(picture, cell)
        canvas.paste(fitted, (left + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2))
        pen.text((left, top + cell + 3), _short(name, font, cell), "black", font)
    return canvas


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _short(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of the name, as much as fits."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if font.getlength(name) <= width:
        return name
    while font.getlength("…" + name) > width:
        name = name[1:]
    return "…" + name
