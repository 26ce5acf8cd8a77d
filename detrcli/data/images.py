"""The one decoder: anything that holds a picture, as an upright (3, H, W) uint8 RGB tensor.

Training, evaluation and prediction all read pictures here, so a model never sees another picture than the one it was
trained on. The rules:

    orientation   EXIF is obeyed; an annotated size that fits only the stored pixels keeps them as stored
    16 bit        divided by 257, so that white stays white (Pillow's own conversion turns nearly everything white)
    transparency  laid over white, as a viewer shows it, not the hidden colour underneath
    CMYK, palette, grey, 1 bit   converted by Pillow
    animations    the first frame
    damage        an ImageError with the name and the reason; never a half-grey picture

Pillow reads every file, and decodes all but plain JPEG ones without a fault: those are decoded straight to RGB, by the library
that Pillow, too, decodes them with, but without its fourth byte a pixel, which would have to be copied away.
"""

from __future__ import annotations

import os
import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from detrcli.errors import ImageError

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Tensor"

# Pillow warns of odd metadata and of large pictures; both are ruled on here. For good: pictures are read in threads, and what
# `catch_warnings` puts back there would undo, or keep for ever, what another thread has chosen.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses; about 13,400 x 13,400
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: Source, *, size: tuple[int, int] | None = None, name: str | None = None) -> Tensor:
    """The picture as (3, H, W) uint8 RGB. `size` (height, width) is what annotations say; another size is an error.

    `source` is a path, the bytes of a file, a Pillow picture, or pixels: arrays (H, W), (H, W, 1 | 3 | 4), tensors
    (H, W), (1 | 3 | 4, H, W); whole numbers in 0..255 (uint16: 0..65535) or floating point in 0..1.
    """
    if isinstance(source, Tensor):
        return _from_array(_channels_last(source), name or "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, Image.Image):
        return _upright(source, size, name or getattr(source, "filename", "") or "picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(bytes(source), size=size, name=name or "bytes")
    return decode(_file_bytes(Path(source)), size=size, name=name or os.fspath(source))


def decode(data: bytes, *, size: tuple[int, int] | None = None, name: str = "bytes") -> Tensor:
    """The picture in an encoded file."""
    return _upright(open_image(data, name), size, name, data)


def open_image(data: bytes, name: str) -> Image.Image:
    """The picture behind a file's bytes, header read, pixels not yet."""
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        picture = Image.open(BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture ({_looks_like(data)})") from None
    except Image.DecompressionBombError as error:
        raise _too_large(name, error) from None
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        raise ImageError(f"{name}: broken header ({_reason(error)})") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(name, picture.width * picture.height)
    return picture


def shown_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width as a viewer shows the picture."""
    width, height = picture.size
    return (width, height) if orientation(picture) >= 5 else (height, width)


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not damage the picture
        return 1
    return value if value in _TURNS else 1


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"{path}: {_reason(error)}") from None


def _upright(
    picture: Image.Image, size: tuple[int, int] | None, name: str, data: bytes | None = None
) -> Tensor:
    """`data`: the file that the picture was opened from."""
    pixels = _plain_jpeg(picture, data, name) if data is not None else None
    if pixels is None:
        _load(picture, name)
    turn = _turn(picture, size, name)  # asked now: Pillow turns a TIFF itself, while it loads it
    if pixels is None:
        pixels = _rgb(picture if turn is None else picture.transpose(turn), name)
    elif turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    if not pixels.flags.writeable:  # Pillow's own bytes
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _load(picture: Image.Image, name: str) -> None:
    try:
        picture.load()
    except Image.DecompressionBombError as error:
        raise _too_large(name, error) from None
    except Exception as error:  # as above: any reader, any error
        raise ImageError(f"{name}: damaged ({_reason(error)})") from None


def _turn(picture: Image.Image, size: tuple[int, int] | None, name: str) -> Image.Transpose | None:
    """What makes the picture upright, or what an annotation says of its size true."""
    turn = _TURNS.get(orientation(picture))
    stored = (picture.height, picture.width)
    shown = (picture.width, picture.height) if turn in _SWAPPING else stored
    if size is None or 0 in size or size == shown:
        return turn
    if size != stored:
        raise ImageError(
            f"{name}: the picture is {stored[1]} x {stored[0]}, its annotation says {size[1]} x {size[0]}"
        )
    return None


def _plain_jpeg(picture: Image.Image, data: bytes, name: str) -> npt.NDArray[np.uint8] | None:
    """The pixels (H, W, 3) of a JPEG file in which nothing is out of order; None where Pillow must judge."""
    if picture.format != "JPEG" or picture.mode not in ("RGB", "L"):
        return None
    try:
        pixels: npt.NDArray[np.uint8] = decode_jpeg(data, "RGB")
    except ValueError as error:
        if "premature end" not in str(error).lower():
            return None
        _load(picture, name)  # where Pillow sees it, too; elsewhere it makes up the rest, in grey
        raise ImageError(f"{name}: damaged (a part of the picture is missing)") from None
    return pixels


_SWAPPING = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}


def _rgb(picture: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """The pixels as (H, W, 3) uint8, whatever the mode."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        return _grey(np.asarray(picture), name)
    if mode in ("RGBa", "La"):
        picture = picture.convert("RGBA" if mode == "RGBa" else "LA")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.asarray(picture)


def _grey(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """16-bit, 32-bit and floating point grey (H, W) as (H, W, 3) uint8."""
    return np.repeat(_to_bytes(values, name)[:, :, None], 3, axis=2)


def _to_bytes(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Any numbers as 0..255, by the type's range and, for wide types, by the values'."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 65535):  # also refuses NaN
        raise ImageError(f"{name}: values from {low:g} to {high:g} are no picture; scale them to 8 or 16 bit")
    if values.dtype.kind == "f" and high <= 1:
        scale = 255.0
    else:
        scale = 1 / 257 if values.dtype.itemsize == 2 or high > 255 else 1.0
    return np.asarray(np.rint(values.astype(np.float32) * scale), np.uint8)


def _channels_last(pixels: Tensor) -> npt.NDArray[Any]:
    pixels = pixels.detach().cpu()
    if pixels.dtype in (torch.bfloat16, torch.float16):
        pixels = pixels.float()
    return (pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy()


def _from_array(pixels: npt.NDArray[Any], name: str) -> Tensor:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ImageError(f"{name}: shape {tuple(pixels.shape)} is no picture; it needs 1, 3 or 4 channels")
    if pixels.dtype.kind not in "buif":
        raise ImageError(f"{name}: values of type {pixels.dtype} are no picture")
    pixels = _to_bytes(pixels, name)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        pixels = _rgb(Image.fromarray(np.ascontiguousarray(pixels), "RGBA"), name)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _too_large(name: str, found: int | Image.DecompressionBombError) -> ImageError:
    """Pillow's error begins with the number and goes on at length."""
    pixels = re.search(r"\d+", str(found))
    many = f" ({int(pixels[0]):,})" if pixels else ""
    return ImageError(f"{name}: too many pixels{many}; the limit is {MAX_PIXELS:,}")


def _looks_like(data: bytes) -> str:
    head = data[:40].lstrip()
    if not any(data[:512]):
        return "it holds zeros"
    if head.isascii() and b"\0" not in head:
        return f"it begins with {head[:16].decode('ascii')!r}"
    return "no format that Pillow knows"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200] or type(error).__name__
