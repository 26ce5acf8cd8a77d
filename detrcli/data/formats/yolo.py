"""YOLO: a data.yaml with splits and names, and one text file of normalised boxes (or outlines) for each picture.

The classes are its names; another number of them in `nc` is reported, and has no effect.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.defects import Defects
from detrcli.data.formats.files import Files, is_picture, pictures_in, read_text, size_of
from detrcli.data.paths import inside, why_outside
from detrcli.errors import DataError
from detrcli.types import Categories

_SPLITS = ("train", "val", "valid", "validation", "test")
_SLACK = 0.01  # how far outside 0..1 rounding may have put a coordinate


@dataclass(frozen=True, slots=True)
class Spec:
    """A data.yaml: class names by index, and the places of each split's pictures below `root`."""

    source: Path
    root: Path
    categories: Categories
    splits: Mapping[str, tuple[str, ...]]
    count: Any = None  # of classes, as `nc:` says; the names are what counts


def read_spec(path: Path) -> Spec:
    import yaml

    try:
        table = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not YAML: {first}") from None
    if not isinstance(table, dict):
        raise DataError(f"{path}: not a data.yaml: it needs names, train and val")
    splits = {key: _places(table[key], key, path) for key in _SPLITS if table.get(key)}
    if not splits:
        raise DataError(f"{path}: names no split", hint="it needs train: and val:, folders of pictures")
    names = _names(table.get("names"), path)
    return Spec(path, _root(table.get("path"), path), names, splits, table.get("nc"))


def _names(value: Any, path: Path) -> Categories:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: has no class names", hint="it needs names: [first, second, …]")
    if not all(isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 2**31 for key in value):
        raise DataError(f"{path}: names must be a list, or a table with the class numbers 0, 1, …")
    return Categories(tuple(sorted(value)), tuple(str(value[key]) for key in sorted(value)))


def _places(value: Any, key: str, path: Path) -> tuple[str, ...]:
    places = value if isinstance(value, list) else [value]
    if not all(isinstance(place, str) and "\0" not in place for place in places):
        raise DataError(f"{path}: {key} must be a folder, a list of folders, or a .txt with file names")
    return tuple(places)


def _root(value: Any, path: Path) -> Path:
    """`path:` may be absolute, relative to the file, or (as its authors have it) to where the command runs."""
    if not isinstance(value, str) or "\0" in value:
        return path.parent
    return next((place for place in (path.parent / value, Path(value)) if place.is_dir()), path.parent)


def load_yolo(spec: Spec, key: str, *, name: str, split: str, masks: bool = False) -> Dataset:
    """One split; `key` is its word in the file."""
    reader = _Reader(spec, Defects(), Builder(segments_wanted=masks))
    if spec.count not in (None, len(spec.categories)):
        detail = f"nc is {spec.count!r:.60}, there are {len(spec.categories)} names"
        reader.defects.add("class-count", str(spec.source), "", detail)
    for number, file in enumerate(sorted(set(_pictures(spec, key))), 1):
        reader.picture(number, file)
    if not reader.builder.images:
        reader.defects.add("no-images", str(spec.source), key)
    annotations = reader.builder.build()
    return Dataset(name, split, spec.categories, annotations, Files(spec.root), reader.defects)


def _pictures(spec: Spec, key: str) -> Iterator[str]:
    """The split's pictures, relative to the root."""
    for place in spec.splits[key]:
        found = _existing(spec, place)
        if found.is_file() and found.suffix == ".txt":
            lines = (line.strip() for line in read_text(found).splitlines())
            yield from (_below(spec, spec.root / line) for line in lines if line)
        elif found.is_file() and is_picture(found):
            yield _below(spec, found)
        else:
            yield from (_below(spec, path) for path in pictures_in(found))


def _existing(spec: Spec, place: str) -> Path:
    """The folder or list: below the root, also where an export wrote `../train/images` for `train/images`."""
    tried = [spec.root / place, spec.root / place.removeprefix("../"), spec.root / place / "images"]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise DataError(f"{spec.source}: {place!r} is not there (looked for {tried[0]})")
    return found


def _below(spec: Spec, path: Path) -> str:
    """The name of a picture relative to the root, which must hold it."""
    name = Path(os.path.relpath(path, spec.root)).as_posix() if "\0" not in str(path) else str(path)
    reason = why_outside(name)
    if reason is not None:
        raise DataError(
            f"{spec.source}: {str(path)!r} refused, {reason}",
            hint="set path: to a folder that holds all pictures",
        )
    return name


def label_file(name: str) -> str:
    """Where the boxes of `…/images/….jpg` stand: `…/labels/….txt`, or beside the picture."""
    parts = list(Path(name).parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt").as_posix()


@dataclass(slots=True)
class _Reader:
    spec: Spec
    defects: Defects
    builder: Builder

    def picture(self, number: int, name: str) -> None:
        path = inside(self.spec.root, name)
        height, width = size_of(path)
        if not height:
            self.defects.add("unreadable-image" if path.exists() else "missing-file", str(path))
            return
        image = self.builder.image(number, name, height, width)
        labels = inside(self.spec.root, label_file(name))
        if not labels.exists():
            self.defects.add("no-label-file", str(path))
            return
        for line, text in enumerate(read_text(labels).splitlines(), 1):
            if text.strip():
                self._line(text, f"line {line}", str(labels), image, (height, width))

    def _line(self, text: str, where: str, file: str, image: int, size: tuple[int, int]) -> None:
        found = parse_line(text)
        if isinstance(found, str):
            self.defects.add("bad-line", file, where, f"{found}: {text.strip()[:60]!r}")
            return
        number, points = found
        if number not in self.spec.categories.ids:
            self.defects.add(
                "unknown-category", file, where, f"class {number} of {len(self.spec.categories)}"
            )
            return
        scaled = [value * side for value, side in zip(points, (size[1], size[0]) * len(points), strict=False)]
        box, outline = _box(scaled)
        segment = json.dumps([outline]) if outline else "null"
        label = self.spec.categories.label_of(number)
        self.builder.add(image, len(self.builder.rows) + 1, label, box, segment=segment)


def parse_line(text: str) -> tuple[int, list[float]] | str:
    """Class number and coordinates (four of a box, or the pairs of an outline), or what is wrong with the line."""
    words = text.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        return "not numbers"
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        return f"{len(values)} numbers; a box has 5, an outline 7, 9, 11, …"
    if not all(map(math.isfinite, values)):
        return "not finite"
    if values[0] < 0 or not values[0].is_integer():
        return "the class is not a whole number"
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values[1:]):
        return "not in 0..1: coordinates are fractions of the picture"
    return int(values[0]), values[1:]


def _box(points: list[float]) -> tuple[tuple[float, float, float, float], list[float]]:
    """The box xywh in pixels, and the outline if the line has one."""
    if len(points) == 4:
        x, y, w, h = points
        return (x - w / 2, y - h / 2, w, h), []
    xs, ys = points[::2], points[1::2]
    return (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), points
