from __future__ import annotations

import contextlib
import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrcli.data import images
from detrcli.data.images import MAX_PIXELS, decode, open_image, read_image
from detrcli.errors import ImageError

from .miniature import picture


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(tensor: torch.Tensor, y: int = 0, x: int = 0) -> list[int]:
    return tensor[:, y, x].tolist()


def test_all_sources_give_the_same_picture(tmp_path):
    image = picture(20, 10)
    path = tmp_path / "ünï çode.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    floats = array.astype(np.float32) / 255
    for source in (path, str(path), path.read_bytes(), image, array, floats, tensor, tensor.half() / 255):
        read = read_image(source)
        assert (read.shape, read.dtype) == ((3, 10, 20), torch.uint8)
        assert (read.int() - tensor.int()).abs().max() <= (1 if source is not image else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    upright = picture(24, 16)
    stored = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    image = upright
    for turn in stored.get(orientation, []):
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        read = read_image(encoded(image, kind, exif=exif))
        assert torch.equal(read, read_image(upright)), kind


def test_an_annotated_size_decides_between_stored_and_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(50, 30), exif=exif)
    assert read_image(data).shape == (3, 50, 30)
    assert read_image(data, size=(50, 30)).shape == (3, 50, 30)
    assert read_image(data, size=(30, 50)).shape == (3, 30, 50)
    assert read_image(data, size=(0, 0)).shape == (3, 50, 30)
    with pytest.raises(ImageError, match="photo: the picture is 50 x 30, its annotation says 31 x 50"):
        read_image(data, size=(50, 31), name="photo")


@pytest.mark.parametrize(("mode", "value", "expected"), [
    ("L", 200, [200, 200, 200]),
    ("1", 1, [255, 255, 255]),
    ("I;16", 65535, [255, 255, 255]),
    ("I;16", 257 * 100, [100, 100, 100]),
    ("I", 65535, [255, 255, 255]),
    ("I", 200, [200, 200, 200]),
    ("F", 1.0, [255, 255, 255]),
    ("F", 128.0, [128, 128, 128]),
    ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
    ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
    ("LA", (0, 0), [255, 255, 255]),
    ("La", (0, 0), [255, 255, 255]),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, value, expected):
    assert pixel(read_image(Image.new(mode, (4, 4), value))) == expected


def test_a_palette_keeps_its_colours_and_its_transparency():
    palette = Image.new("RGB", (4, 4), (250, 0, 10)).quantize(4)
    assert pixel(read_image(encoded(palette))) == [250, 0, 10]
    index = palette.getpixel((0, 0))
    assert pixel(read_image(encoded(palette, transparency=index))) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    red, _, blue = pixel(read_image(data))
    assert red > 200 > 50 > blue


def jpeg() -> bytes:
    return encoded(picture(64, 48), "JPEG")


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "the file is empty"),
    (b"<!DOCTYPE html><html>sign in", "not a picture .it begins with '<!DOCTYPE html>"),
    (b"\0" * 4096, "not a picture .it holds zeros"),
    (b"\x00\x01\xfe\xff" * 40, "no format that Pillow knows"),
    (jpeg()[:-200], "damaged .*truncated"),
    (jpeg()[:30], "not a picture|broken header|damaged"),
    (encoded(picture(64, 48))[:-60], "damaged"),
])  # fmt: skip
def test_damage_is_named(tmp_path, data, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 3


def png_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("1", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_a_bomb_is_refused_before_it_is_decoded():
    assert MAX_PIXELS < 20_000 * 10_000
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(png_that_claims(20_000, 10_000))


def test_a_large_picture_below_the_limit_is_opened_without_a_warning():
    assert open_image(png_that_claims(10_000, 9_000), "large").size == (10_000, 9_000)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a directory"):
        read_image(tmp_path)
    if os.geteuid() != 0:  # root reads everything
        locked = tmp_path / "locked.jpg"
        locked.write_bytes(jpeg())
        locked.chmod(0)
        with pytest.raises(ImageError, match="permission denied"):
            read_image(locked)


@pytest.mark.parametrize("array", [
    np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8),
    np.full((4, 4, 3), np.nan), np.full((4, 4), -1.0), np.full((4, 4), 1e6), np.zeros((4, 4), complex),
])  # fmt: skip
def test_arrays_that_are_no_pictures_are_refused(array):
    with pytest.raises(ImageError):
        read_image(array)


SEEDS = [
    encoded(picture(16, 12), "JPEG"),
    encoded(picture(16, 12)),
    encoded(picture(16, 12), "TIFF", compression="tiff_lzw"),
    encoded(picture(16, 12).quantize(8), "GIF"),
    encoded(picture(16, 12), "WEBP"),
    encoded(picture(16, 12), "BMP"),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_mutated_files_give_a_picture_or_our_error(seed, changes, length):
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    with contextlib.suppress(ImageError):
        assert decode(bytes(data[: int(len(data) * max(length, 0.3)) + 1])).dtype == torch.uint8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_jpeg_files_sound_and_damaged_are_read_as_pillow_reads_them(data):
    """Plain files have a quicker decoder; where anything is out of order in them Pillow judges, as it does of all others."""
    size = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    image = picture(*size).convert(data.draw(st.sampled_from(["RGB", "L", "CMYK"])))
    how = data.draw(
        st.fixed_dictionaries(
            {"quality": st.sampled_from([1, 50, 95, 100]), "progressive": st.booleans()},
            optional={"subsampling": st.integers(0, 2), "restart_marker_rows": st.integers(1, 3)},
        )
    )
    file = bytearray(encoded(image, "JPEG", **how))
    for _ in range(data.draw(st.integers(0, 3))):
        file[data.draw(st.integers(2, len(file) - 1))] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.sampled_from([len(file), len(file) - 1, len(file) // 2]))]

    def read() -> list[object]:
        try:
            return decode(bytes(file)).tolist()
        except ImageError as error:
            return [str(error)]

    found = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_plain_jpeg", lambda *_: None)
        by_pillow = read()
    assert found == by_pillow or (
        found == ["bytes: damaged (a part of the picture is missing)"] and by_pillow[1:]
    )


def test_a_jpeg_file_that_ends_in_order_but_too_early_is_damaged():
    """Pillow takes it, and makes up the second half."""
    file = encoded(picture(64, 64), "JPEG", quality=95)
    early = file[: len(file) * 2 // 3] + b"\xff\xd9"
    open_image(early, "early").load()
    with pytest.raises(ImageError, match="a part of the picture is missing"):
        decode(early)


def test_a_sound_jpeg_file_is_not_left_to_pillow(monkeypatch):
    file = encoded(picture(20, 10), "JPEG")
    expected = decode(file)
    monkeypatch.setattr(images, "_load", lambda *_: pytest.fail("Pillow decoded it"))
    assert torch.equal(decode(file), expected)
