"""Hugging Face `datasets`: `hf:owner/name`, with a picture and `objects` in each row. Needs `pip install detrcli[hf]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.defects import Defects
from detrcli.data.formats import values
from detrcli.data.formats.files import size_of
from detrcli.data.formats.values import whole
from detrcli.data.images import decode, open_image, read_image, shown_size
from detrcli.errors import DataError, DetrError, ImageError
from detrcli.types import Categories

_BOXES, _CLASSES = ("bbox", "bboxes", "boxes"), ("category", "categories", "category_id", "label", "labels")


@dataclass(frozen=True, slots=True)
class Rows:
    """Pictures in a table of Arrow, decoded by our own decoder."""

    table: Any
    column: str

    def read(self, index: int, name: str, size: tuple[int, int]) -> Tensor:
        data, path = self.place(index)
        if data:
            return decode(data, size=size, name=name)
        if path:
            return read_image(path, size=size)
        raise ImageError(f"{name}: row {index} holds no picture")

    def stored(self, index: int, name: str) -> bytes:
        """The picture as it came."""
        data, path = self.place(index)
        if data or path:
            return data or Path(path).read_bytes()
        raise ImageError(f"{name}: row {index} holds no picture")

    def place(self, index: int) -> tuple[bytes, str]:
        """A row has its picture, or the path of it, or neither."""
        value = self.table[index][self.column] or {}
        return value.get("bytes") or b"", value.get("path") or ""

    def file(self, index: int, name: str) -> None:
        """None: a row is no file."""


def open_hub(name: str) -> Mapping[str, Any]:
    """All splits of `owner/name` (or of a local folder), not decoded."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name} needs the package datasets", hint="pip install 'detrcli[hf]'") from None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # its loaders and the network fail in any way
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hf:{name} cannot be loaded: {first[:300]}",
            hint="is the name right, and the network there? What is not public needs a token: hf auth login",
        ) from error
    return dict(found)


def load_rows(tables: Mapping[str, Any], key: str, *, name: str, split: str, masks: bool = False) -> Dataset:
    """One split, with the classes of all."""
    from datasets import Image

    table = tables[key]
    picture = next((c for c, kind in table.features.items() if isinstance(kind, Image)), None)
    if picture is None or "objects" not in table.features:
        raise DataError(
            f"{name}: no detection data: its columns are {', '.join(table.features)}",
            hint="it needs a column of pictures and a column objects with bbox and category",
        )
    table = table.cast_column(picture, Image(decode=False))
    boxes, classes = (_field(_features(table), names, name) for names in (_BOXES, _CLASSES))
    categories = _categories(tables, key, classes)
    reader = _Reader(table, picture, name, categories, Defects(), Builder(segments_wanted=masks))
    kept = reader.read(boxes, classes)
    rows = Rows(table.select(kept), picture)
    return Dataset(name, split, categories, reader.builder.build(), rows, reader.defects)


def _field(features: Mapping[str, Any], names: tuple[str, ...], source: str) -> str:
    found = next((name for name in names if name in features), None)
    if found is None:
        raise DataError(f"{source}: its objects have {', '.join(features)}, but none of {', '.join(names)}")
    return found


def _features(table: Any) -> Any:
    """What an object has."""
    kind = table.features["objects"]
    return getattr(kind, "feature", kind)


def _categories(tables: Mapping[str, Any], key: str, classes: str) -> Categories:
    """The names of the class column where it has some, else the numbers or words that occur; over all splits, so that they
    agree."""
    feature = _features(tables[key])[classes]
    while not hasattr(feature, "names") and hasattr(feature, "feature"):
        feature = feature.feature
    if hasattr(feature, "names"):
        return Categories(tuple(range(len(feature.names))), tuple(feature.names))
    used = {label for table in tables.values() for label in _labels(table, classes)} - {None}
    if all(isinstance(label, int) for label in used):
        return Categories(tuple(sorted(used)), tuple(f"class {label}" for label in sorted(used)))
    return Categories(tuple(range(len(used))), tuple(sorted(map(str, used))))


def _labels(table: Any, classes: str) -> Iterator[Any]:
    for row in table.select_columns(["objects"]):
        yield from (_label(value) for _, value in _objects(row["objects"], classes, classes))


def _label(value: Any) -> str | int | None:
    return value if isinstance(value, str) else whole(value)


@dataclass(slots=True)
class _Reader:
    table: Any
    picture: str
    name: str
    categories: Categories
    defects: Defects
    builder: Builder

    def read(self, boxes: str, classes: str) -> list[int]:
        """The rows that became images: of two with one id the first."""
        others = [c for c in self.table.column_names if c in ("image_id", "height", "width")]
        rows = list(self.table.select_columns([*others, "objects"]))
        ids = self._ids(rows)
        sizes = {index: self._size(index, rows[index]) for index in ids}
        found = {index: self._found(index, rows[index], boxes, classes) for index in ids}
        corners = _are_corners([[box for _, box, _ in found[index]] for index in ids], list(sizes.values()))
        if corners:
            self.defects.add("corner-boxes", self.name)
        for index, key in ids.items():
            image = self.builder.image(key, f"row-{index:06d}.png", *sizes[index])
            for where, box, label in found[index]:
                self._add(image, where, box, label, corners)
        return list(ids)

    def _ids(self, rows: list[Any]) -> dict[int, int]:
        """By row, the image ids of the table where all are whole numbers, else the numbers of the rows."""
        found: dict[int, int] = {}  # by id
        for index, row in enumerate(rows):
            key = whole(row.get("image_id", index + 1))
            if key is None:
                self.defects.add("bad-image-id", self.name, f"row {index}", repr(row["image_id"])[:60])
                return {index: index + 1 for index in range(len(rows))}
            if found.setdefault(key, index) != index:
                self.defects.add("duplicate-image-id", self.name, f"row {index}", str(key))
        return {index: key for key, index in found.items()}

    def _found(self, index: int, row: Any, boxes: str, classes: str) -> list[tuple[str, list[float], Any]]:
        """The objects of a row whose boxes are some: where each stands, its box and its class."""
        pairs = enumerate(_objects(row["objects"], boxes, classes), 1)
        placed = ((f"row {index} object {place}", box, label) for place, (box, label) in pairs)
        read = (
            (where, values.box(box, self.defects, self.name, where), label) for where, box, label in placed
        )
        return [(where, box, label) for where, box, label in read if box is not None]

    def _size(self, index: int, row: Mapping[str, Any]) -> tuple[int, int]:
        height, width = whole(row.get("height")), whole(row.get("width"))
        if height and width and height > 0 and width > 0:
            return height, width
        data, path = Rows(self.table, self.picture).place(index)
        if path and not data:
            return size_of(Path(path))
        try:
            return shown_size(open_image(data, f"row {index}"))
        except DetrError:
            return 0, 0

    def _add(self, image: int, where: str, box: list[float], value: Any, corners: bool) -> None:
        known, label = self.categories, _label(value)
        if isinstance(label, str) and label in known.names:
            at = known.label_named(label)
        elif isinstance(label, int) and label in known.ids:
            at = known.label_of(label)
        else:
            self.defects.add("unknown-category", self.name, where, repr(value)[:60])
            return
        x, y, w, h = box
        if corners:
            w, h = w - x, h - y
        self.builder.add(image, len(self.builder.rows) + 1, at, (x, y, w, h))


def _objects(value: Any, boxes: str, classes: str) -> list[tuple[Any, Any]]:
    """(box, class) pairs, from a table of lists or a list of tables; None where one of them is missing."""
    if isinstance(value, Mapping):
        return list(zip_longest(value[boxes] or [], value[classes] or []))
    return [(item[boxes], item[classes]) for item in value or []]


def _are_corners(found: list[list[list[float]]], sizes: list[tuple[int, int]]) -> bool:
    """Whether the boxes leave their pictures as xywh but are all well inside as x1 y1 x2 y2."""
    outside = False
    for boxes, (height, width) in zip(found, sizes, strict=True):
        for a, b, c, d in boxes:
            if c <= a or d <= b or (height and (c > width + 2 or d > height + 2)):
                return False
            outside |= bool(height) and (a + c > width + 2 or b + d > height + 2)
    return outside
