"""The small picture in a terminal: only where the terminal says that it can."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from detrcli.cli.preview import COLUMNS, encode, way_of
from tests.spotter import BLUE, RED


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
        ({}, None),
    ],
)
def test_a_way_is_taken_only_when_the_terminal_says_so(environment, way):
    assert way_of(environment) == way


def halves() -> Image.Image:
    picture = Image.new("RGB", (300, 200), RED)
    picture.paste(BLUE, (0, 100, 300, 200))
    return picture


@pytest.mark.parametrize("way", ["kitty", "iterm"])
def test_picture_protocols_carry_a_whole_png(way):
    text = encode(halves(), way)
    pattern = r"\x1b_G[^;]*;([^\x1b]*)\x1b\\" if way == "kitty" else r":([A-Za-z0-9+/=]+)\x07"
    data = base64.b64decode("".join(re.findall(pattern, text)))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.getpixel((0, 0)) == RED


def test_blocks_hold_two_pixels_a_character():
    rows = encode(halves(), "blocks").splitlines()
    assert len(rows) == COLUMNS * 200 // 300 // 2
    assert all(row.count("▀") == COLUMNS for row in rows)
    assert "38;2;255;0;0" in rows[0]
    assert "48;2;0;0;255" in rows[-1]
