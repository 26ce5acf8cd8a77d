"""The one form that every data set takes in memory: flat arrays, and a way to read picture i.

    Annotations   what the annotation files say, as nine arrays; image i owns the rows offsets[i]:offsets[i + 1]
    Dataset       annotations + pictures + categories + name and split

Lists of dictionaries are what makes memory grow in every worker process (each access touches a reference count, and so
copies its page). Arrays are not touched by reading, and `Annotations.shared` moves them into memory that spawned
workers map instead of copying.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detrcli.data.defects import Defects
from detrcli.errors import typed
from detrcli.types import Categories

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Strings(Sequence[str]):
    """Many strings in two arrays."""

    text: Array  # (bytes,) uint8, UTF-8
    ends: Array  # (N,) int64

    @classmethod
    def pack(cls, strings: Iterable[str]) -> Strings:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class Objects:
    """The annotated objects of one picture."""

    labels: Array  # (T,) int64, contiguous
    boxes: Array  # (T, 4) float64, xywh in pixels
    crowd: Array  # (T,) bool
    rows: slice  # where they stand in the annotations

    @property
    def trainable(self) -> Array:
        """Which objects a model learns from: neither crowds nor boxes without area."""
        return np.asarray(~self.crowd & (self.boxes[:, 2] > 0) & (self.boxes[:, 3] > 0))


@dataclass(frozen=True, slots=True)
class Annotations:
    """N images and their A objects. Ids are the data set's own; labels are contiguous."""

    image_ids: Array  # (N,) int64
    sizes: Array  # (N, 2) int64, height and width as annotated; 0 where the file does not say
    offsets: Array  # (N + 1,) int64
    ids: Array  # (A,) int64, unique and above 0
    labels: Array  # (A,) int64
    boxes: Array  # (A, 4) float64, xywh in pixels
    areas: Array  # (A,) float64
    crowd: Array  # (A,) bool
    names: Strings  # (N,) file names, relative to the folder of the pictures
    segments: Strings | None = None  # (A,) outlines as COCO JSON, only where a paper needs masks
    shelf: Tensor | None = field(default=None, repr=False)  # the shared memory under the arrays, if any

    def __len__(self) -> int:
        return len(self.image_ids)

    def objects(self, index: int) -> Objects:
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Objects(self.labels[rows], self.boxes[rows], self.crowd[rows], rows)

    def select(self, indices: Sequence[int] | Array) -> Annotations:
        """The given images with their objects, in the given order."""
        chosen = np.asarray(indices, np.int64)
        counts = np.diff(self.offsets)[chosen]
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen] or [np.zeros(0, np.int64)]
        )
        return Annotations(
            self.image_ids[chosen],
            self.sizes[chosen],
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            self.ids[rows],
            self.labels[rows],
            self.boxes[rows],
            self.areas[rows],
            self.crowd[rows],
            Strings.pack(self.names[i] for i in chosen),
            None if self.segments is None else Strings.pack(self.segments[i] for i in rows),
        )

    def shared(self) -> Annotations:
        """The same in shared memory: worker processes map it, whatever way they are started."""
        if self.shelf is not None:
            return self
        arrays = list(_arrays(self))
        size = sum(_padded(a.nbytes) for a in arrays)
        shelf = torch.empty(max(size, 1), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        for view, array in zip(_views(shelf, _layout(arrays)), arrays, strict=True):
            view[...] = array
        return _on_shelf(shelf, _layout(arrays))

    def __reduce__(self) -> tuple[Callable[..., Annotations], tuple[Any, ...]]:
        if self.shelf is not None:
            return _on_shelf, (self.shelf, _layout(list(_arrays(self))))
        return Annotations, tuple(getattr(self, f.name) for f in dataclasses.fields(self))


_Layout = list[tuple[str, tuple[int, ...]]]


def _arrays(value: Annotations) -> Iterator[Array]:
    yield from (value.image_ids, value.sizes, value.offsets, value.ids, value.labels)
    yield from (value.boxes, value.areas, value.crowd, value.names.text, value.names.ends)
    if value.segments is not None:
        yield from (value.segments.text, value.segments.ends)


def _layout(arrays: list[Array]) -> _Layout:
    return [(a.dtype.str, a.shape) for a in arrays]


def _padded(size: int) -> int:
    return -(-size // 8) * 8  # every array begins at a multiple of its item size


def _views(shelf: Tensor, layout: _Layout) -> Iterator[Array]:
    memory, start = shelf.numpy(), 0
    for kind, shape in layout:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        yield memory[start : start + size].view(kind).reshape(shape)
        start += _padded(size)


def _on_shelf(shelf: Tensor, layout: _Layout) -> Annotations:
    views = list(_views(shelf, layout))
    images, sizes, offsets, ids, labels, boxes, areas, crowd, text, ends = views[:10]
    segments = Strings(*views[10:]) if len(views) > 10 else None
    names = Strings(text, ends)
    return Annotations(images, sizes, offsets, ids, labels, boxes, areas, crowd, names, segments, shelf)


@dataclass(slots=True)
class Builder:
    """Collects images and objects in any order and gives `Annotations` in the order of the images."""

    segments_wanted: bool = False
    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    rows: list[tuple[int, int, int, float, float, float, float, float, bool]] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)

    def image(self, image_id: int, name: str, height: int, width: int) -> int:
        self.images.append((image_id, name, height, width))
        return len(self.images) - 1

    def add(
        self,
        image: int,
        annotation_id: int,
        label: int,
        box: Sequence[float],
        *,
        area: float | None = None,
        crowd: bool = False,
        segment: str = "null",
    ) -> None:
        x, y, w, h = box
        self.rows.append((image, annotation_id, label, x, y, w, h, w * h if area is None else area, crowd))
        if self.segments_wanted:
            self.segments.append(segment)

    def renumber(self, row: int, annotation_id: int) -> None:
        image, _, label, x, y, w, h, area, crowd = self.rows[row]
        self.rows[row] = (image, annotation_id, label, x, y, w, h, area, crowd)

    def build(self) -> Annotations:
        table = np.array(self.rows, np.float64).reshape(-1, 9)
        order = np.argsort(table[:, 0], kind="stable")
        table = table[order]
        counts = np.bincount(table[:, 0].astype(np.int64), minlength=len(self.images))
        return Annotations(
            image_ids=np.array([i[0] for i in self.images], np.int64),
            sizes=np.array([i[2:] for i in self.images], np.int64).reshape(-1, 2),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            ids=np.array([row[1] for row in self.rows], np.int64)[order],
            labels=table[:, 2].astype(np.int64),
            boxes=np.ascontiguousarray(table[:, 3:7]),
            areas=np.ascontiguousarray(table[:, 7]),
            crowd=table[:, 8] > 0,
            names=Strings.pack(i[1] for i in self.images),
            segments=Strings.pack(self.segments[i] for i in order) if self.segments_wanted else None,
        )


class Pictures(Protocol):
    """How a data set's pictures are read. Must survive pickling."""

    def read(self, index: int, name: str, size: tuple[int, int]) -> Tensor:
        """Picture `index`, called `name`, as (3, H, W) uint8; `size` is the annotated height and width, 0 if unknown."""
        ...

    def file(self, index: int, name: str) -> Path | None:
        """The file that holds the picture, if it is one."""
        ...

    def stored(self, index: int, name: str) -> bytes | None:
        """The picture as it came; None where it is drawn."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a data set."""

    name: str
    split: str
    categories: Categories
    annotations: Annotations
    pictures: Pictures
    defects: Defects = field(default_factory=Defects)  # what was found, and done about it, while loading
    asked: str = ""  # as it is typed, where more than its name is needed

    def __len__(self) -> int:
        return len(self.annotations)

    def picture(self, index: int) -> Tensor:
        """Picture `index` as (3, H, W) uint8."""
        height, width = self.annotations.sizes[index]
        return self.pictures.read(index, self.annotations.names[index], (int(height), int(width)))

    def file(self, index: int) -> Path | None:
        """The file of picture `index`, if it is one."""
        return self.pictures.file(index, self.annotations.names[index])

    def select(self, indices: Sequence[int] | Array) -> Dataset:
        """The given images only, for example the first 100 for a trial."""
        chosen = np.asarray(indices, np.int64)
        pictures = Selected(self.pictures, chosen)
        return dataclasses.replace(self, annotations=self.annotations.select(chosen), pictures=pictures)

    def shared(self) -> Dataset:
        return dataclasses.replace(self, annotations=self.annotations.shared(), defects=Defects())

    @property
    def check_command(self) -> str:
        """What to type to see all that is wrong with it."""
        return f"detr data check {self.asked or typed(self.name)}"

    def refuse(self, *, skip: bool = False) -> None:
        """An error for what must not be trained or evaluated on; with `skip` only for what cannot be left out."""
        self.defects.refuse(self.check_command, skip=skip)

    def digest(self) -> str:
        """A sha256 of what is learned from and scored against: the pictures by id and name, their objects, the classes."""
        a, running = self.annotations, hashlib.sha256(repr(self.categories).encode())
        arrays = [a.image_ids, a.names.text, a.names.ends, a.offsets, a.labels, a.boxes, a.crowd]
        if a.segments is not None:
            arrays += [a.segments.text, a.segments.ends]
        for array in arrays:
            running.update(array.tobytes())
        return running.hexdigest()

    def to_coco(self) -> dict[str, Any]:
        """The split as a COCO document, with the data set's own image, annotation and category ids."""
        a, owner = self.annotations, self.categories
        image_of = np.repeat(a.image_ids, np.diff(a.offsets))
        return {
            "info": {"description": f"{self.name} {self.split}"},
            "images": [
                {"id": int(i), "file_name": name, "height": int(h), "width": int(w)}
                for i, name, (h, w) in zip(a.image_ids, a.names, a.sizes, strict=True)
            ],
            "annotations": [
                {
                    "id": int(a.ids[r]),
                    "image_id": int(image_of[r]),
                    "category_id": owner.ids[a.labels[r]],
                    "bbox": a.boxes[r].tolist(),
                    "area": float(a.areas[r]),
                    "iscrowd": int(a.crowd[r]),
                }
                | _outline(a, r)
                for r in range(len(a.ids))
            ],
            "categories": [{"id": i, "name": name} for i, name in zip(owner.ids, owner.names, strict=True)],
        }


def _outline(a: Annotations, row: int) -> dict[str, Any]:
    """What a COCO document says of it: nothing where there is none."""
    text = "null" if a.segments is None else a.segments[row]
    return {} if text == "null" else {"segmentation": json.loads(text)}


@dataclass(frozen=True, slots=True)
class Selected:
    """Some pictures of another source, in another order."""

    source: Pictures
    indices: Array

    def read(self, index: int, name: str, size: tuple[int, int]) -> Tensor:
        return self.source.read(int(self.indices[index]), name, size)

    def file(self, index: int, name: str) -> Path | None:
        return self.source.file(int(self.indices[index]), name)

    def stored(self, index: int, name: str) -> bytes | None:
        return self.source.stored(int(self.indices[index]), name)
