"""Pictures that lie in a folder, and reading the text files that lie beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from detrcli.data.images import read_image, shown_size
from detrcli.data.paths import inside
from detrcli.errors import DataError

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".avif",
        ".mpo",
    ]
)
LARGEST_TEXT = 16 * 2**20  # of one label file: a million objects in one picture


@dataclass(frozen=True, slots=True)
class Files:
    """Pictures in a folder."""

    root: Path

    def read(self, index: int, name: str, size: tuple[int, int]) -> Tensor:
        return read_image(inside(self.root, name), size=size)

    def file(self, index: int, name: str) -> Path:
        return inside(self.root, name)

    def stored(self, index: int, name: str) -> bytes:
        """The picture as it came."""
        return inside(self.root, name).read_bytes()


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures of a folder and its subfolders, sorted."""
    return (path for path in sorted(folder.rglob("*")) if is_picture(path) and path.is_file())


def size_of(path: Path) -> tuple[int, int]:
    """Height and width as a viewer shows the picture, from its header; (0, 0) where that cannot be read."""
    try:
        with Image.open(path) as picture:
            return shown_size(picture)
    except Exception:  # a broken picture is reported when it is decoded, with the reason
        return 0, 0


def read_text(path: Path) -> str:
    """A small UTF-8 file."""
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many for a label file")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
