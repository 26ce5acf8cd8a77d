"""What the arrays of a data set show, vectorised: geometry, areas, repetitions, empty classes, missing files; and the
repair of it. A second for all of COCO, so it runs at every load. What the headers of its pictures show takes longer."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from detrcli.data.annotations import Annotations, Array, Dataset, Selected, Strings
from detrcli.data.defects import KEPT, Defects
from detrcli.data.formats.files import Files
from detrcli.data.images import open_image, shown_size
from detrcli.data.masks import undecodable
from detrcli.errors import DataError, ImageError

QUERIES = 100  # of DETR, the fewest of the zoo: more objects than these cannot all be found
HEADER = 1 << 15  # bytes read of a picture to see what it is
SHORT, LONG = 800, 1333  # what evaluation resizes to by default


def structure(dataset: Dataset) -> Defects:
    """What the arrays alone show; outlines, where there are some, take longer than all the rest."""
    defects, a = Defects(), dataset.annotations
    for kind, rows in _row_defects(a):
        _report(defects, kind, dataset, rows)
    counts = np.diff(a.offsets)
    for image in np.flatnonzero(counts == 0):
        defects.add("empty-image", a.names[image])
    for image in np.flatnonzero(counts > QUERIES):
        defects.add(
            "many-objects", a.names[image], "", f"{counts[image]} objects, DETR has {QUERIES} queries"
        )
    used = np.bincount(a.labels, minlength=len(dataset.categories))
    for label in np.flatnonzero(used == 0):
        defects.add("empty-category", dataset.name, "", dataset.categories.names[label])
    if len(a) and not len(a.ids):
        defects.add("no-objects", dataset.name, dataset.split)
    return defects


def _row_defects(a: Annotations) -> Iterator[tuple[str, Array]]:
    """Kinds with the rows that they are true of."""
    x, y, w, h = a.boxes.T
    height, width = np.repeat(a.sizes, np.diff(a.offsets), axis=0).T
    sized, empty = height > 0, (w <= 0) | (h <= 0)
    outside = sized & ~empty & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = (x < -1e-6) | (y < -1e-6) | (x + w > width + 1e-6) | (y + h > height + 1e-6)
    yield "empty-box", np.flatnonzero(empty)
    yield "outside-box", np.flatnonzero(outside)
    yield "box-over-edge", np.flatnonzero(sized & over & ~empty & ~outside)
    yield "bad-area", np.flatnonzero(~empty & _wrong_area(a))
    yield "bad-outline", undecodable(a)
    yield "duplicate-object", duplicates(a)
    scale = np.minimum(
        SHORT / np.maximum(np.minimum(height, width), 1), LONG / np.maximum(height, width).clip(1)
    )
    yield "tiny-box", np.flatnonzero(sized & ~empty & (np.minimum(w, h) * scale < 1))


def _wrong_area(a: Annotations) -> Array:
    limit = a.boxes[:, 2] * a.boxes[:, 3]
    return np.asarray((a.areas <= 0) | (a.areas > limit * 1.01 + 1))


def duplicates(a: Annotations) -> Array:
    """Rows that repeat the image, class and box of an earlier row."""
    image = np.repeat(np.arange(len(a)), np.diff(a.offsets))
    table = np.column_stack([image, a.labels, a.crowd, a.boxes])
    if not len(table):
        return np.zeros(0, np.int64)
    first = np.unique(table, axis=0, return_index=True)[1]
    return np.setdiff1d(np.arange(len(table)), first)


def _report(defects: Defects, kind: str, dataset: Dataset, rows: Array) -> None:
    """All rows are counted, the first thousand described."""
    if len(rows) > KEPT:
        defects.counts[kind] += len(rows) - KEPT
        rows = rows[:KEPT]
    a = dataset.annotations
    images = np.searchsorted(a.offsets, rows, side="right") - 1
    for row, image in zip(rows.tolist(), images.tolist(), strict=True):
        height, width = a.sizes[image]
        box = [round(v, 2) for v in a.boxes[row].tolist()]
        detail = f"box {box} in {width} x {height}"
        if kind == "bad-area":
            detail = f"area {a.areas[row]:g}, box {box}"
        if kind == "bad-outline" and a.segments is not None:
            detail = a.segments[row][:60]
        defects.add(kind, a.names[image], f"annotation {a.ids[row]}", detail)


def shared_pictures(dataset: Dataset, other: Dataset) -> int:
    """How many pictures of a split are those of another, too, by place or because all is said of them that is said there.
    That others are copies shows only where all are read."""
    if len(dataset) == len(other) and dataset.digest() == other.digest():
        return len(other)
    return len(_places(dataset) & _places(other))


def _places(dataset: Dataset) -> set[str]:
    """Where the files of the pictures are, links to folders followed."""
    source, real = dataset.pictures, functools.cache(os.path.realpath)
    while isinstance(source, Selected):
        source = source.source
    if not isinstance(source, Files):
        return set()
    pairs = (os.path.split(os.path.join(source.root, name)) for name in dataset.annotations.names)
    return {os.path.join(real(folder), name) for folder, name in pairs}


def missing_files(dataset: Dataset) -> dict[str, str]:
    """Names that are not in their folder, and which folder is not there either; one listing a folder instead of a question a
    file."""
    if not isinstance(dataset.pictures, Files):
        return {}
    root, there = dataset.pictures.root, dict[str, frozenset[str] | None]()
    missing = {}
    for name in dataset.annotations.names:
        folder, file = os.path.split(name)
        if folder not in there:
            there[folder] = frozenset(os.listdir(root / folder)) if (root / folder).is_dir() else None
        listed = there[folder]
        if listed is None or file not in listed:
            missing[name] = f"there is no folder {root / folder}" if listed is None else ""
    return missing


def broken_files(dataset: Dataset, but: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """Pictures whose headers say that they are none, or of another size than annotated, with the kind of defect and its detail.

    Each costs a fraction of a millisecond; that the rest is damaged shows only when it is decoded.
    """
    source, known = dataset.pictures, frozenset(but)
    if not isinstance(source, Files):
        return {}
    sizes = ((int(h), int(w)) for h, w in dataset.annotations.sizes)
    asked = {
        name: size for name, size in zip(dataset.annotations.names, sizes, strict=True) if name not in known
    }
    with ThreadPoolExecutor(8) as pool:  # what it waits for is the disk
        found = pool.map(lambda name: _broken(source, name, asked[name]), asked)
        return {name: what for name, what in zip(asked, found, strict=True) if what}


def _broken(source: Files, name: str, size: tuple[int, int]) -> tuple[str, str] | None:
    try:
        with source.file(0, name).open("rb") as file:
            head = file.read(HEADER)
            try:
                picture = open_image(head, name)
            except ImageError:  # some have much before the size
                picture = open_image(head + file.read(), name)
    except ImageError as error:
        return "unreadable-image", error.message.removeprefix(f"{name}: ")
    except (OSError, ValueError, DataError) as error:
        return "missing-file", str(error)
    stored = (picture.height, picture.width)
    if 0 in size or size == stored or size == shown_size(picture):
        return None
    return "size-differs", f"{stored[1]} x {stored[0]}, annotated as {size[1]} x {size[0]}"


def repair(dataset: Dataset, bad: Iterable[str] = ()) -> Dataset:
    """A copy without bad pictures, empty, outside and repeated boxes, and outlines that mean nothing; the other boxes clipped,
    areas made plausible."""
    dropped = frozenset(bad)
    keep = [i for i, name in enumerate(dataset.annotations.names) if name not in dropped]
    dataset = dataset.select(keep)
    a = dataset.annotations
    wanted = np.ones(len(a.ids), bool)
    for kind, rows in _row_defects(a):
        if kind in ("empty-box", "outside-box", "duplicate-object"):
            wanted[rows] = False
        if kind == "bad-outline" and len(rows):
            a = _without_outlines(a, rows)
    boxes, areas = _clipped(a), a.areas.copy()
    changed = dataclasses.replace(a, boxes=boxes)
    wrong = _wrong_area(changed)
    areas[wrong] = (boxes[:, 2] * boxes[:, 3])[wrong]
    repaired = _rows(dataclasses.replace(changed, areas=areas), wanted)
    return dataclasses.replace(dataset, annotations=repaired, defects=Defects())


def _without_outlines(a: Annotations, rows: Array) -> Annotations:
    gone = frozenset(rows.tolist())
    kept = ("null" if row in gone else text for row, text in enumerate(a.segments or ()))
    return dataclasses.replace(a, segments=Strings.pack(kept), shelf=None)


def _clipped(a: Annotations) -> Array:
    """Boxes cut at the edges of their pictures, where the size is known."""
    height, width = np.repeat(a.sizes, np.diff(a.offsets), axis=0).T
    limit = np.where(height > 0, [width, height], np.inf).T  # (A, 2)
    low = np.clip(a.boxes[:, :2], 0, limit)
    high = np.clip(a.boxes[:, :2] + a.boxes[:, 2:], 0, limit)
    cut = np.concatenate([low, high - low], axis=1)
    inside = np.isclose(cut, a.boxes, rtol=0, atol=1e-6).all(axis=1)
    return np.where(inside[:, None], a.boxes, cut)


def _rows(a: Annotations, wanted: Array) -> Annotations:
    before = np.concatenate([[0], np.cumsum(wanted)])  # how many wanted rows stand before each row
    return dataclasses.replace(
        a,
        offsets=before[a.offsets],
        ids=a.ids[wanted],
        labels=a.labels[wanted],
        boxes=a.boxes[wanted],
        areas=a.areas[wanted],
        crowd=a.crowd[wanted],
        segments=None if a.segments is None else Strings.pack(a.segments[i] for i in np.flatnonzero(wanted)),
        shelf=None,
    )
