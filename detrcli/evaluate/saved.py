"""Detections that `detr predict --format coco` saved. Its ids are its own; what they mean, by name, stands in a file beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np

from detrcli.data.annotations import Dataset
from detrcli.errors import DataError
from detrcli.evaluate.run import lacking, match_categories
from detrcli.evaluate.tables import DetectionTable, Ints, read_json
from detrcli.types import Categories

T = TypeVar("T")
KEY_FILE = "coco_images.json"
APART = f"if {KEY_FILE} is not of these detections, or their ids are the data's own, move it away"


@dataclass(frozen=True, slots=True)
class Key:
    """What the ids of saved detections mean."""

    path: Path
    pictures: dict[int, str]
    categories: Categories

    @classmethod
    def read(cls, path: Path) -> Key:
        document = read_json(path)
        try:
            pictures = {int(image["id"]): str(image["file_name"]) for image in document["images"]}
            pairs = [(int(row["id"]), str(row["name"])) for row in document["categories"]]
            categories = Categories(tuple(i for i, _ in pairs), tuple(name for _, name in pairs))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} does not say what the ids beside it mean", hint=APART) from error
        return cls(path, pictures, categories)


def in_ids_of(
    dataset: Dataset, table: DetectionTable, path: Path, images: int
) -> tuple[DetectionTable, tuple[str, ...]]:
    """The detections of the file `path` in the ids of the data set, and what was done for it, in words.

    Without the file beside them their ids are the data's. Classes that the data does not have are left out, as a model's are;
    those that only the data has are told, as far as its first `images` show them.
    """
    beside = path.with_name(KEY_FILE)
    if not beside.is_file():
        return table, ()
    key = Key.read(beside)
    known = dict(zip(key.categories.ids, match_categories(key.categories, dataset.categories), strict=True))
    pictures = _each(table.image_ids, _images(key, dataset, np.unique(table.image_ids).tolist()))
    classes = [_meant(known, number, "class", key) for number in np.unique(table.category_ids).tolist()]
    categories = _each(table.category_ids, classes)
    kept = np.flatnonzero(categories >= 0)
    found = DetectionTable(pictures, categories, table.scores, table.boxes).rows(kept)
    note = f"{path}: pictures and classes were matched with the data by their names in {KEY_FILE}"
    return found, (note, *lacking(key.categories, dataset.select(range(images))))


def _each(ids: Ints, values: Iterable[int]) -> Ints:
    """For each id the value that stands for it; `values` are those of the ids in order, once each."""
    return np.array([*values], np.int64)[np.unique(ids, return_inverse=True)[1]]


def _images(key: Key, dataset: Dataset, ids: Sequence[int]) -> list[int]:
    """The data's id of each picture."""
    sources = [_meant(key.pictures, number, "picture", key) for number in ids]
    names = _Names(dataset.annotations.names)
    rows = [names.row_of(source) for source in sources]
    if missing := [source for source, row in zip(sources, rows, strict=True) if row is None]:
        raise DataError(
            f"{key.path}: {len(missing)} of {len(ids)} pictures are not in the data by name, the first: {missing[0]}",
            hint=f"predict on the pictures of this split, or name theirs with --split; {APART}",
        )
    taken: dict[int | None, str] = {}
    for source, row in zip(sources, rows, strict=True):
        if (other := taken.setdefault(row, source)) is not source:
            raise DataError(
                f"{key.path}: {other} and {source} would be the same picture of the data",
                hint="predict on each picture of the data once, in a run of its own for each split",
            )
    return [int(dataset.annotations.image_ids[row]) for row in rows]


def _meant(known: dict[int, T], number: int, what: str, key: Key) -> T:
    if number not in known:
        raise DataError(
            f"{key.path}: {what} {number} of the detections beside it is not in it",
            hint=f"keep the two files that one run wrote together; {APART}",
        )
    return known[number]


class _Names:
    """File names of a data set, to be found however the path to them was written."""

    def __init__(self, names: Sequence[str]) -> None:
        paths = [PurePath(name) for name in names]
        self.full = {path.as_posix(): row for row, path in enumerate(paths)}
        self.bases: dict[str, list[int]] = {}
        for row, path in enumerate(paths):
            self.bases.setdefault(path.name, []).append(row)

    def row_of(self, source: str) -> int | None:
        """By the longest end of the path that is a name of the data, else by the last part, where that is one picture's only."""
        parts = PurePath(source).parts
        for start in range(len(parts)):
            row = self.full.get(PurePath(*parts[start:]).as_posix())
            if row is not None:
                return row
        rows = self.bases.get(parts[-1] if parts else "", [])
        return rows[0] if len(rows) == 1 else None
