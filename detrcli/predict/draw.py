"""Boxes and labels on a picture: readable at any size, one colour a class, labels that do not cover each other."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detrcli.predict.result import Box, Detection

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SMALL = 480  # pictures with a shorter long side are enlarged: no label fits in 100 pixels
LONGEST = 28  # letters of a name on a label
GOLDEN = 0.618033988749895  # turns of the hue between neighbouring ids: the most even spread for any number of classes

# Fonts that cover more than Latin, in the places where systems keep them; the first that has every letter is taken.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial.ttf",
)


def annotate(pixels: Tensor, detections: Sequence[Detection], *, scores: bool = True) -> Image.Image:
    """A picture (3, H, W) uint8 with its detections drawn, the best on top; annotations are drawn without scores."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = max(1, -(-SMALL // max(picture.size)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 400))
    size = max(12, round(max(picture.size) / 55))
    for found in reversed(detections):
        _draw_box(pen, _scaled(found.box, scale), colour_of(found.category_id), line)
    taken: list[Box] = []
    for found in detections:
        text = label_of(found, size, scores=scores)
        font = font_for(text, size)
        place = _place(_scaled(found.box, scale), _extent(text, font), picture.size, taken)
        taken.append(place)
        _draw_label(pen, place, text, font, colour_of(found.category_id))
    return picture


def colour_of(category_id: int) -> Colour:
    """The colour of a class: always the same for the same id, neighbouring ids far apart."""
    hue = category_id * GOLDEN % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if category_id % 2 else 0.65, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever can be read on `colour`."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def label_of(found: Detection, size: int = 16, *, scores: bool = True) -> str:
    """`name 0.98`; a name that no font here can draw is replaced by the class id."""
    name = " ".join(found.name.split())
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    if _covering(name, size) is None:
        name = f"class {found.category_id}"
    return f"{name} {found.score:.2f}" if scores else name


@functools.lru_cache(maxsize=1024)
def font_for(text: str, size: int) -> Font:
    return _covering(text, size) or ImageFont.load_default(size)


@functools.lru_cache(maxsize=1024)
def _covering(text: str, size: int) -> Font | None:
    """The first font that has a glyph for every letter of `text`."""
    return next((font for font in _fonts(size) if _covers(font, text)), None)


@functools.lru_cache(maxsize=8)
def _fonts(size: int) -> tuple[Font, ...]:
    return (*_system_fonts(size), ImageFont.load_default(size))


def _system_fonts(size: int) -> Iterator[Font]:
    for name in FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def _covers(font: Font, text: str) -> bool:
    """A missing glyph is drawn as the font's box for "no such letter"; Pillow has no other way to ask."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in set(text))


def _scaled(box: Box, scale: int) -> Box:
    x1, y1, x2, y2 = box
    return x1 * scale, y1 * scale, x2 * scale, y2 * scale


def _draw_box(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int) -> None:
    """A coloured frame with a thin dark edge, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2), max(y1, y2)
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _extent(text: str, font: Font) -> tuple[float, float]:
    """Width and height of a label with its margin."""
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox("Ágjy|")
    margin = (bottom - top) / 5
    return right - left + 2 * margin, bottom - top + 2 * margin


def _place(box: Box, extent: tuple[float, float], canvas: tuple[int, int], taken: list[Box]) -> Box:
    """Where a label goes: by its box, inside the picture, on other labels only when there is no free place."""
    width, height = extent
    candidates = [_inside((x, y, x + width, y + height), canvas) for x, y in _spots(box, width, height)]
    return min(candidates, key=lambda place: sum(_overlap(place, other) for other in taken))


def _spots(box: Box, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Upper left corners, the best first: `min` keeps the first of equals."""
    x1, y1, x2, y2 = box
    yield from ((x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2))
    yield from ((x1, y2 - height), (x2 - width, y1), (x2 - width, y2 - height), (x2, y1), (x1 - width, y1))
    yield from ((x1, y1 + step * height) for step in range(1, int((y2 - y1) / height)))  # down its left side


def _inside(place: Box, canvas: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = place
    dx = max(0.0, -x1) or min(0.0, max(canvas[0] - x2, -x1))
    dy = max(0.0, -y1) or min(0.0, max(canvas[1] - y2, -y1))
    return x1 + dx, y1 + dy, x2 + dx, y2 + dy


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _draw_label(pen: ImageDraw.ImageDraw, place: Box, text: str, font: Font, colour: Colour) -> None:
    pen.rectangle(place, fill=colour)
    _, top, _, bottom = font.getbbox("Ágjy|")
    margin = (bottom - top) / 5
    pen.text((place[0] + margin, place[1] + margin - top), text, font=font, fill=ink_on(colour))


def save(picture: Image.Image, path: Path) -> None:
    """Write a JPEG or, for any other name, a PNG; packed fast, since pictures of results are looked at and deleted."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture.save(path, "JPEG", quality=92, subsampling=0)
    else:
        picture.save(path, "PNG", compress_level=1)
