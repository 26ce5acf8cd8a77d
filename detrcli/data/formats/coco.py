"""COCO JSON: `images`, `annotations`, `categories`, read into `Annotations` with every defect reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detrcli.data.annotations import Annotations, Builder, Dataset
from detrcli.data.defects import Defects
from detrcli.data.formats import values
from detrcli.data.formats.files import Files
from detrcli.data.formats.values import number, whole
from detrcli.data.paths import why_outside
from detrcli.errors import DataError
from detrcli.types import Categories


def load_coco(path: Path, images: Path, *, name: str, split: str, masks: bool = False) -> Dataset:
    """One annotation file with the folder of its pictures."""
    annotations, categories, defects = read_coco(load_json(path, masks=masks), str(path), masks=masks)
    return Dataset(name, split, categories, annotations, Files(images), defects)


def load_json(path: Path, *, masks: bool = False) -> Any:
    """The document; outlines, which are most of it, are dropped while parsing unless wanted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_hook=None if masks else _without_outline)
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except (RecursionError, ValueError) as error:  # nested a thousand deep; numbers of thousands of digits
        raise DataError(f"{path}: not a COCO file: {str(error)[:100]}") from None


def _without_outline(table: dict[str, Any]) -> dict[str, Any]:
    table.pop("segmentation", None)
    return table


def read_coco(document: Any, source: str, *, masks: bool = False) -> tuple[Annotations, Categories, Defects]:
    """The document as arrays, repaired as the defects' table says; only what is no COCO at all raises."""
    reader = _Reader(source, Defects(), Builder(segments_wanted=masks))
    images, annotations, categories = (
        _rows(document, key, source) for key in ("images", "annotations", "categories")
    )
    known = reader.categories(categories)
    reader.read_images(images)
    if not reader.images:
        reader.defects.add("no-images", source)
    reader.read_annotations(annotations)
    return reader.builder.build(), known, reader.defects


def _rows(document: Any, key: str, source: str) -> list[Any]:
    rows = document.get(key) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise DataError(
            f"{source}: not a COCO annotation file: it has no list {key!r}",
            hint="it needs the lists images, annotations and categories",
        )
    return rows


def _find(table: dict[int, int], key: Any) -> int | None:
    found = whole(key)
    return None if found is None else table.get(found)


@dataclass(slots=True)
class _Reader:
    source: str
    defects: Defects
    builder: Builder
    labels: dict[int, int] = field(default_factory=dict)  # category id -> label
    images: dict[int, int] = field(default_factory=dict)  # image id -> index

    def categories(self, rows: list[Any]) -> Categories:
        names: dict[int, str] = {}
        for place, row in enumerate(rows):
            where = f"category at place {place}"
            key = whole(row.get("id")) if isinstance(row, dict) else None
            name = row.get("name") if isinstance(row, dict) else None
            if key is None or not isinstance(name, str) or not name.strip():
                self.defects.add("bad-category", self.source, where)
            elif key in names:
                self.defects.add("duplicate-category-id", self.source, where)
            else:
                if name in names.values():
                    self.defects.add("duplicate-category-name", self.source, where, repr(name))
                names[key] = name
        if not names:
            self.defects.add("no-categories", self.source)
        self.labels = {key: label for label, key in enumerate(sorted(names))}
        return Categories(tuple(self.labels), tuple(names[key] for key in self.labels))

    def read_images(self, rows: list[Any]) -> None:
        seen: set[str] = set()
        for place, row in enumerate(rows):
            key = whole(row.get("id")) if isinstance(row, dict) else None
            name = row.get("file_name") if isinstance(row, dict) else None
            if key is None or not isinstance(name, str):
                self.defects.add("bad-image", self.source, f"image at place {place}")
                continue
            where = f"image {key} ({name})"
            outside = why_outside(name)
            if outside is not None:
                self.defects.add("path-escapes", self.source, where, outside)
                continue
            if key in self.images:
                self.defects.add("duplicate-image-id", self.source, where)
                continue
            if name in seen:
                self.defects.add("duplicate-file", self.source, where)
            seen.add(name)
            self.images[key] = self.builder.image(key, name, *self._size(row, where))

    def _size(self, row: Mapping[str, Any], where: str) -> tuple[int, int]:
        height, width = whole(row.get("height")), whole(row.get("width"))
        if height is None or width is None or not (0 < height < 2**20 and 0 < width < 2**20):
            self.defects.add("bad-size", self.source, where)
            return 0, 0
        return height, width

    def read_annotations(self, rows: list[Any]) -> None:
        taken: set[int] = set()
        unnumbered: list[int] = []  # rows of the builder that still need an id
        for place, row in enumerate(rows):
            if not isinstance(row, dict):
                self.defects.add("bad-annotation", self.source, f"annotation at place {place}")
                continue
            where = f"annotation {row['id']!r:.60}" if "id" in row else f"annotation at place {place}"
            key = self._annotation_id(row, where, taken)
            if self._add(row, where, key or 0) and key is None:
                unnumbered.append(len(self.builder.rows) - 1)
        free = max(taken, default=0)
        for place, at in enumerate(unnumbered, 1):
            self.builder.renumber(at, free + place)

    def _annotation_id(self, row: Mapping[str, Any], where: str, taken: set[int]) -> int | None:
        """The id, or None where a new one is needed."""
        key = whole(row.get("id"))
        kind = None
        if "id" not in row:
            kind = "missing-id"
        elif key is None:
            kind = "bad-annotation-id"
        elif key in taken:
            kind = "duplicate-annotation-id"
        elif key <= 0:
            kind = "zero-annotation-id"
        if kind is not None:
            self.defects.add(kind, self.source, where)
            return None
        assert key is not None
        taken.add(key)
        return key

    def _add(self, row: Mapping[str, Any], where: str, key: int) -> bool:
        """Whether the annotation could be used."""
        image, label = _find(self.images, row.get("image_id")), _find(self.labels, row.get("category_id"))
        box = values.box(row.get("bbox"), self.defects, self.source, where)
        if image is None:
            self.defects.add("unknown-image", self.source, where, f"image_id {row.get('image_id')!r:.60}")
        if label is None:
            self.defects.add(
                "unknown-category", self.source, where, f"category_id {row.get('category_id')!r:.60}"
            )
        if image is None or label is None or box is None:
            return False
        area, crowd = self._area(row, where), self._crowd(row, where)
        segment = json.dumps(row.get("segmentation")) if self.builder.segments_wanted else "null"
        self.builder.add(image, key, label, box, area=area, crowd=crowd, segment=segment)
        return True

    def _area(self, row: Mapping[str, Any], where: str) -> float | None:
        if "area" not in row:
            self.defects.add("missing-area", self.source, where)
            return None
        area = number(row["area"])
        if area is None or not math.isfinite(area):
            self.defects.add("bad-area", self.source, where, repr(row["area"])[:60])
            return None
        return area

    def _crowd(self, row: Mapping[str, Any], where: str) -> bool:
        if "iscrowd" not in row:
            self.defects.add("missing-iscrowd", self.source, where)
        elif row["iscrowd"] not in (0, 1):
            self.defects.add("bad-iscrowd", self.source, where, repr(row["iscrowd"])[:60])
        return row.get("iscrowd") in (1,)
