"""Whatever a user points at: a picture is read as a viewer shows it, or the reason why not is said in one line."""

from __future__ import annotations

import contextlib
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

from detrcli.errors import ImageError
from detrcli.predict.sources import Input, expand
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
    (tree / "deep" / "loop").symlink_to(tree)
    assert names(tree / "deep", recursive=True).count("c.webp") == 1


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
        told = []
        with as_nobody():
            sources = [f"{base}/inner/locked", f"{base}/inner", f"{base}/locked.png"]
            assert list(spotter().predict(sources, recursive=True, on_failure=told.append)) == []
        assert [f.source.removeprefix(base) for f in told] == [
            "/inner/locked",
            "/inner/locked",
            "/locked.png",
        ]
        assert all("permission denied" in f.reason for f in told)
        (Path(base) / "inner" / "locked").chmod(0o700)


class Pipe:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def piped(monkeypatch, data: bytes) -> list[Input]:
    monkeypatch.setattr(sys, "stdin", Pipe(data))
    return list(expand("-"))


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
