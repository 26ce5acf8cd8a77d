"""Whatever a user points at: a picture is read as a viewer shows it, or the reason why not is said in one line."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from detrcli.errors import DetrError, ImageError
from detrcli.predict.sources import Input, expand
from detrcli.runs import new_run
from tests.spotter import BLUE, RED, scene, spotter


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def palette_with_alpha() -> Image.Image:
    picture = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    picture.info["transparency"] = picture.getpixel((0, 0))
    return picture


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.full((40, 60), 40_000, np.uint16))


PICTURES = {
    "cmyk": lambda: encoded(scene().convert("CMYK"), "JPEG", quality=95),
    "sixteen bit": lambda: encoded(sixteen_bit(), "PNG"),
    "palette with alpha": lambda: encoded(palette_with_alpha(), "PNG"),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), RED), "PNG"),
    "thread": lambda: encoded(Image.new("RGB", (50_000, 10)), "PNG"),
    "grey": lambda: encoded(scene().convert("L"), "PNG"),
    "one bit": lambda: encoded(scene().convert("1"), "PNG"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_are_read(name):
    [result] = spotter().predict(PICTURES[name]())
    assert result.pixels.dtype.itemsize == 1
    assert tuple(result.pixels.shape) == (3, result.height, result.width)
    if name in ("cmyk", "palette with alpha"):
        assert {d.name for d in result.detections} == {"red spot", "blue spot"}
    if name == "sixteen bit":
        assert 150 < result.pixels.float().mean() < 160  # 40,000 of 65,535, not white


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(kind):
    frames = [scene((64, 64), ((10, 10, 40 + i, 40, (RED, BLUE)[i > 0]),)) for i in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    [result] = spotter().predict(data)
    assert [d.name for d in result.detections] == ["red spot"]
    assert result.notes == ("first of 3 frames",)


def bomb() -> bytes:
    """The header of a picture of 60,000 by 60,000 pixels."""
    data = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = (60_000).to_bytes(4, "little") * 2
    return bytes(data)


BROKEN = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"Dear reader, this is no picture at all.", "not a picture"),
    "zeros": (lambda: bytes(1000), "not a picture"),
    "html": (lambda: b"<!DOCTYPE html><html></html>", "not a picture"),
    "truncated jpeg": (lambda: encoded(scene(), "JPEG")[:1500], "damaged"),
    "truncated png": (lambda: encoded(scene(), "PNG")[:200], "damaged|broken"),
    "bomb": (bomb, r"too many pixels \(3,600,000,000\); the limit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named_with_the_reason(tmp_path, name):
    make, said = BROKEN[name]
    path = tmp_path / "photo.jpg"
    path.write_bytes(make())
    told = []
    assert list(spotter().predict(path, on_failure=told.append)) == []
    assert told[0].source == str(path)
    assert "photo.jpg" in told[0].reason
    with pytest.raises(ImageError, match=said):
        list(spotter().predict(path))


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_picture_or_our_error(data, magic):
    with contextlib.suppress(ImageError):
        Input("any", magic + data).read()


@pytest.fixture(scope="module")
def sound() -> list[bytes]:
    animation = encoded(scene((60, 50)), "GIF", save_all=True, append_images=[scene((60, 50), ())])
    return [encoded(scene((60, 50)), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")] + [animation]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_survived(sound, data):
    picture = bytearray(data.draw(st.sampled_from(sound)))
    for _ in range(data.draw(st.integers(1, 8))):
        picture[data.draw(st.integers(0, len(picture) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(picture)))
    with contextlib.suppress(ImageError):
        Input("any", bytes(picture[:cut] if data.draw(st.booleans()) else picture)).read()


def names(*sources, **options) -> list[str]:
    return [Path(i.name).name for i in expand(sources, **options) if not isinstance(i.source, ImageError)]


def reasons(*sources, **options) -> list[str]:
    return [i.source.message for i in expand(sources, **options) if isinstance(i.source, ImageError)]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "deep/c.webp", "deep/deeper/d.tif", ".hidden/e.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_folders_give_pictures_in_order_and_go_down_by_choice(tree):
    assert names(tree) == ["a.JPG", "b.png"]
    assert names(tree, recursive=True) == ["e.png", "a.JPG", "b.png", "c.webp", "d.tif"]


def test_globs_are_expanded_unless_a_file_has_that_name(tree):
    assert names(f"{tree}/*.[pJ]*") == ["a.JPG", "b.png"]
    assert names(f"{tree}/**/*.tif") == ["d.tif"]
    (tree / "x[1].png").touch()
    assert names(f"{tree}/x[1].png") == ["x[1].png"]
    assert reasons(f"{tree}/*.gif") == [f"{tree}/*.gif: no file matches"]


def test_other_addresses_than_those_of_the_web_are_refused():
    assert reasons("ftp://host/a.png", "s3://bucket/*.png") == [
        f"{name}: of addresses only http and https are read"
        for name in ("ftp://host/a.png", "s3://bucket/*.png")
    ]


def test_folders_without_pictures_and_missing_files_are_said(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no picture in it" in reasons(tmp_path / "empty")[0]
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        list(spotter().predict(tmp_path / "gone.png"))
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="no such file"):
        list(spotter().predict(tmp_path / "broken.png"))
    with pytest.raises(ImageError, match="null"):
        list(spotter().predict("nul\0.png"))


def test_folders_that_lead_back_to_themselves_are_entered_once(tree):
    """With one link `glob` takes each picture forty times, with two it never ends."""
    (tree / "deep" / "loop").symlink_to(tree)
    (tree / "deep" / "ring").symlink_to(tree)
    assert names(tree / "deep", recursive=True).count("c.webp") == 1
    assert names(f"{tree}/deep/**/*.webp") == ["c.webp"]
    assert names(f"{tree}/**/**/*.tif", f"{tree}/*/**/d.*") == ["d.tif", "d.tif"]


def test_two_stars_find_what_they_find_in_a_shell(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "de[e]p").mkdir()
    (tree / "de[e]p" / "f.png").touch()
    for pattern in (
        "**/*.png",
        "**",
        "deep/**",
        "**/deeper/*",
        "*/**/*.tif",
        "**/.hidden/*.png",
        f"{tree}/**/*.*",
    ):
        found = [i.name for i in expand(pattern)]
        assert found == sorted(p for p in glob.glob(pattern, recursive=True) if not os.path.isdir(p)) != []


def test_folders_to_leave_out_are_entered_only_by_their_name(tree):
    deep = tree / "deep"
    assert names(tree, recursive=True, leave_out=[deep, tree / "gone"]) == ["e.png", "a.JPG", "b.png"]
    assert names(f"{tree}/**/[cd].*", leave_out=[deep / "deeper"]) == ["c.webp"]
    assert names(deep, f"{deep}/**/*.tif", recursive=True, leave_out=[deep]) == ["c.webp", "d.tif", "d.tif"]


def test_an_entry_that_cannot_be_looked_at_is_told_and_passed_over(tree):
    (tree / "far.png").symlink_to("far" * 100)  # longer than any name
    assert names(tree) == ["a.JPG", "b.png", "far.png"]
    with pytest.raises(ImageError, match="file name too long"):
        list(spotter().predict(tree / "far.png"))


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(path, "wb") as file:
        file.write(encoded(scene(), "PNG"))
    [result] = spotter().predict(os.fsdecode(path))
    assert result.source.endswith("/??.png")


@contextlib.contextmanager
def as_nobody():
    """Permissions hold for everyone but root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_what_may_not_be_read_is_said():
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        (Path(base) / "locked.png").touch(mode=0o000)
        (Path(base) / "inner").mkdir()
        (Path(base) / "inner" / "locked").mkdir(mode=0o000)
        (Path(base) / "shown").mkdir()
        (Path(base) / "shown" / "far.png").touch()
        (Path(base) / "shown").chmod(0o444)  # its names may be read, and nothing about them
        told = []
        with as_nobody():
            sources = [f"{base}/inner/locked", f"{base}/inner", f"{base}/locked.png", f"{base}/shown"]
            assert list(spotter().predict(sources, recursive=True, on_failure=told.append)) == []
        assert [f.source.removeprefix(base) for f in told] == [
            "/inner/locked",
            "/inner/locked",
            "/locked.png",
            "/shown/far.png",
        ]
        assert all("permission denied" in f.reason for f in told)
        (Path(base) / "inner" / "locked").chmod(0o700)
        (Path(base) / "shown").chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(
    ("out", "said"), [("shut", "cannot make files in .*shut"), ("shut/out", "cannot make files in .*out")]
)
def test_a_folder_for_results_that_may_not_be_used_is_refused_before_the_work(out, said):
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        (Path(base) / "shut").mkdir(mode=0o555)
        with as_nobody(), pytest.raises(DetrError, match=said) as caught:
            new_run("predict", "any", Path(base) / out)
        assert "--out" in caught.value.hint


class Pipe:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def piped(monkeypatch, data: bytes) -> list[Input]:
    monkeypatch.setattr(sys, "stdin", Pipe(data))
    return list(expand("-"))


def webp_of_a_size_that_ends_a_line() -> bytes:
    every = (encoded(scene((9, 9)), "WEBP", xmp=bytes(length)) for length in range(2, 300, 2))
    return next(data for data in every if data[4] == ord("\n"))


TEXT_FIRST = {
    "PBM": lambda: (encoded(scene().convert("1"), "PPM"), b"P4\n"),
    "PGM": lambda: (encoded(scene().convert("L"), "PPM"), b"P5\n"),
    "PPM": lambda: (encoded(scene(), "PPM"), b"P6\n"),
    "plain PPM": lambda: (b"P3 1 1 255\n255 0 0\n", b"P3 1 1 255\n"),
    "GIF": lambda: (encoded(scene((266, 64)), "GIF"), b"GIF87a\n"),
    "wide GIF": lambda: (encoded(Image.new("P", (0x0A41, 1)), "GIF"), b"GIF87aA\n"),
    "animation": lambda: (
        encoded(
            Image.new("RGB", (10, 9), RED), "GIF", save_all=True, append_images=[scene((10, 9), ())], loop=0
        ),
        b"GIF89a\n",
    ),
    "WebP": lambda: (webp_of_a_size_that_ends_a_line(), b"RIFF\n"),
    "BMP": lambda: (encoded(Image.new("RGB", (4, 39)), "BMP"), b"BM\n"),
}


@pytest.mark.parametrize("name", TEXT_FIRST)
def test_a_picture_whose_first_line_is_text_is_one(monkeypatch, tree, name):
    data, line = TEXT_FIRST[name]()
    assert data.startswith(line)
    [item] = piped(monkeypatch, data)
    assert item.source == data
    item.read()
    monkeypatch.chdir(tree)
    Path(os.fsdecode(line.strip())).touch()  # a file of that name makes it a list
    assert len(piped(monkeypatch, line + b"b.png\n")) == 2


def test_standard_input_is_a_picture_or_a_list_of_names(monkeypatch, tree):
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(scene(), kind)
        [item] = piped(monkeypatch, data)
        assert item.source == data
    listed = f"{tree}/b.png\r\n\n{tree}/*.JPG\n".encode()
    assert [Path(i.name).name for i in piped(monkeypatch, listed)] == ["b.png", "a.JPG"]
    lines = f'{{"source": "{tree}/b.png", "width": 3}}\n{{"file": 1}}\n{{"source": 3}}\n{{bad\n'.encode()
    items = piped(monkeypatch, lines)
    assert Path(items[0].name).name == "b.png"
    assert all('needs a "source"' in i.source.message for i in items[1:])
    assert len(items) == 4
    assert piped(monkeypatch, b"") == []


@given(st.binary(max_size=200))
@example(b"\n\x00\x80")
@example(b'{"source": "\\ud800*/[a].png"}')
@example(b'{"source": "http://\\ud800/"}')
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_standard_input_is_understood_or_refused(monkeypatch, data):
    for item in piped(monkeypatch, data):
        assert item.name.encode("utf-8") is not None
        if isinstance(item.source, ImageError):
            assert item.source.message.encode("utf-8") is not None
