"""Ground truth and detections as flat, checked arrays: what the scorers read.

    TruthTable.of(dataset)            objects and crowds; the data set's reader has refused damaged annotations
    DetectionTable.from_coco(rows)    detections in COCO results form; `check_against(truth)` refuses what cannot be scored

pycocotools accepts nearly anything and answers wrongly: a NaN box scores AP 1.0, a detection of an unknown category
disappears. So detections are checked here, once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detrcli.errors import DataError

if TYPE_CHECKING:
    from detrcli.data.annotations import Dataset

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FORM = 'COCO results form: [{"image_id": 1, "category_id": 3, "bbox": [x, y, w, h], "score": 0.9}, …]'
LIMIT = 2**63  # of a number that can be meant; also refuses NaN
SHOWN = 5  # culprits named in a message
SPILL = 1.05  # a box that ends beyond 105 % of its picture was hardly meant to


@dataclass(frozen=True, slots=True)
class TruthTable:
    """The objects of a data set. Image and category rows are sorted by id; an image's objects keep their order."""

    image_ids: Ints  # (I,)
    sizes: Ints  # (I, 2) height and width, 0 where the data set does not say
    category_ids: Ints  # (K,)
    names: tuple[str, ...]  # (K,)
    object_images: Ints  # (T,) rows of image_ids
    object_categories: Ints  # (T,) rows of category_ids
    boxes: Floats  # (T, 4) xywh, pixels
    areas: Floats  # (T,)
    crowd: NDArray[np.bool_]  # (T,)

    @classmethod
    def of(cls, dataset: Dataset) -> TruthTable:
        """The ground truth of a data set, whose reader has already refused what would falsify numbers."""
        notes, ids = dataset.annotations, np.array(dataset.categories.ids, np.int64)
        image_order, category_order = np.argsort(notes.image_ids, kind="stable"), np.argsort(ids)
        objects = np.repeat(np.arange(len(notes)), np.diff(notes.offsets))
        return cls(
            image_ids=notes.image_ids[image_order],
            sizes=notes.sizes[image_order],
            category_ids=ids[category_order],
            names=tuple(dataset.categories.names[i] for i in category_order),
            object_images=np.argsort(image_order)[objects],
            object_categories=np.argsort(category_order)[notes.labels],
            boxes=notes.boxes,
            areas=notes.areas,
            crowd=notes.crowd,
        )


@dataclass(frozen=True, slots=True)
class DetectionTable:
    """Detections of any number of images, flat, in the data set's own ids."""

    image_ids: Ints  # (N,)
    category_ids: Ints  # (N,)
    scores: Floats  # (N,)
    boxes: Floats  # (N, 4) xywh, pixels

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, chosen: Ints) -> DetectionTable:
        return DetectionTable(
            self.image_ids[chosen], self.category_ids[chosen], self.scores[chosen], self.boxes[chosen]
        )

    @classmethod
    def empty(cls) -> DetectionTable:
        ids = np.zeros(0, np.int64)
        return cls(ids, ids, np.zeros(0), np.zeros((0, 4)))

    @classmethod
    def concatenate(cls, tables: Sequence[DetectionTable]) -> DetectionTable:
        if not tables:
            return cls.empty()
        return cls(
            np.concatenate([t.image_ids for t in tables]),
            np.concatenate([t.category_ids for t in tables]),
            np.concatenate([t.scores for t in tables]),
            np.concatenate([t.boxes for t in tables]),
        )

    @classmethod
    def from_coco(cls, rows: Any, where: str = "detections") -> DetectionTable:
        """Read a list in COCO results form; a row that does not hold four things of the right kind is named."""
        if not isinstance(rows, list):
            raise DataError(f"{where} is not a list of detections", hint=FORM)
        if not rows:
            return cls.empty()
        return cls(
            image_ids=_column(rows, "image_id", _whole, "whole number", where).astype(np.int64),
            category_ids=_column(rows, "category_id", _whole, "whole number", where).astype(np.int64),
            scores=_column(rows, "score", _finite, "finite number", where).astype(np.float64),
            boxes=_column(rows, "bbox", _box, "box of four finite numbers", where).astype(np.float64),
        )

    @classmethod
    def read(cls, path: Path) -> DetectionTable:
        """The detections in a file, without ever holding them as Python objects; only what is wrong is read twice."""
        columns = _Columns()
        document = read_json(path, columns.take)
        table = columns.table() if columns.are_all_of(document) else None
        return cls.from_coco(read_json(path), str(path)) if table is None else table

    def to_coco(self) -> Iterator[dict[str, Any]]:
        """Rows in COCO results form; numbers keep every digit, so that scoring them again gives the same result."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        for image_id, category_id, box, score in zip(*(c.tolist() for c in columns), strict=True):
            yield {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}

    def write(self, path: Path) -> None:
        """Save as COCO results JSON; a file that is there already survives until the new one is whole."""
        partial = path.with_name(path.name + ".part")
        with partial.open("w", encoding="utf-8") as file:
            for row, detection in enumerate(self.to_coco()):
                file.write((",\n" if row else "[") + json.dumps(detection, allow_nan=False))
            file.write("]\n" if len(self) else "[]\n")
        partial.replace(path)

    def check_against(self, truth: TruthTable, where: str = "detections") -> DetectionTable:
        """The same detections with rows of `truth` as ids; those that cannot be scored against it are refused."""
        self._refuse_bad_numbers(where)
        return DetectionTable(
            _rows(self.image_ids, truth.image_ids, "images", where),
            _rows(self.category_ids, truth.category_ids, "categories", where),
            self.scores,
            self.boxes,
        )

    def _refuse_bad_numbers(self, where: str) -> None:
        if (
            np.isfinite(self.scores).all()
            and np.isfinite(self.boxes).all()
            and (self.boxes[:, 2:] >= 0).all()
        ):
            return
        finite = np.isfinite(self.scores) & np.isfinite(self.boxes).all(1)
        for bad, what in (
            (
                ~finite,
                "NaN or infinite: a diverged model writes such numbers, and a NaN box would count as correct",
            ),
            ((self.boxes[:, 2:] < 0).any(1), "of negative size: bbox is x, y, width, height"),
        ):
            if bad.any():
                images = list(dict.fromkeys(self.image_ids[bad].tolist()))
                raise DataError(f"{where}: {bad.sum()} detections are {what} (images {_some(images)})")

    def suspicions(self, truth: TruthTable, where: str) -> list[str]:
        """What looks wrong though it can be scored, in words; ids are rows of `truth`.

        Corner boxes saved as xywh grow out of their pictures; as xyxy the same numbers fit.
        """
        if not len(self):
            return [f"{where}: no detections at all"]
        sizes = np.where(truth.sizes.min(1, keepdims=True) > 0, truth.sizes, np.inf)  # unknown: never left
        height, width = SPILL * sizes[self.image_ids].T
        x, y, a, b = self.boxes.T
        spills = ((x + a > width) | (y + b > height)).mean()
        if spills > 0.3 and ((a <= width) & (b <= height) & (a >= x) & (b >= y)).mean() > 0.99:
            return [
                f"{where}: boxes look like x1, y1, x2, y2, but COCO results are x, y, width, height "
                f"({spills:.0%} leave their picture)"
            ]
        return []


class _Columns:
    """Takes rows out of a JSON document while it is parsed."""

    TAKEN = object()  # stands in the document where a row was
    ROW = np.dtype([("image_id", "i8"), ("category_id", "i8"), ("bbox", "f8", 4), ("score", "f8")])

    def __init__(self) -> None:
        self.rows = bytearray()

    def take(self, row: dict[str, Any], pack: Callable[..., bytes] = struct.Struct("=qq5d").pack) -> Any:
        try:
            self.rows += pack(row["image_id"], row["category_id"], *row["bbox"], row["score"])
        except (KeyError, TypeError, struct.error, OverflowError):  # another kind of object, or to be refused
            return row
        return self.TAKEN

    def are_all_of(self, document: Any) -> bool:
        return (
            isinstance(document, list)
            and len(document) * self.ROW.itemsize == len(self.rows)
            and all(row is self.TAKEN for row in document)
        )

    def table(self) -> DetectionTable | None:
        """None when a number is not finite: then its row is to be named."""
        rows = np.frombuffer(self.rows, self.ROW)
        if not ((np.abs(rows["bbox"]) < LIMIT).all() and (np.abs(rows["score"]) < LIMIT).all()):
            return None
        return DetectionTable(rows["image_id"], rows["category_id"], rows["score"], rows["bbox"])


def read_json(path: Path, take: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON document in a file, or a DataError that says where it breaks; `take` sees every object first."""
    try:
        return json.loads(path.read_bytes(), object_hook=take)
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not whole JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            hint="the file may be cut short: write it again",
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {type(error).__name__}") from error


def _rows(given: Ints, known: Ints, kind: str, where: str) -> Ints:
    """For each id its row of the sorted `known`; ids that are not there are refused."""
    rows = np.searchsorted(known, given)
    strange = given[known.take(rows, mode="clip") != given] if len(known) else given
    if len(strange):
        names = np.unique(strange).tolist()
        raise DataError(
            f"{where}: {len(names)} {kind} are not in the ground truth: {_some(names)}",
            hint=f"ids must be those of the ground truth, for example {_some(known[:3].tolist())}",
        )
    return rows


def _some(items: Sequence[Any], total: int | None = None) -> str:
    more = (total or len(items)) - SHOWN
    return ", ".join(str(item) for item in items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LIMIT


def _box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_finite, value))


def _whole(value: Any) -> bool:
    return _finite(value) and value == int(value)


def _column(
    rows: Sequence[Any], key: str, good: Callable[[Any], bool], what: str, where: str
) -> Floats | Ints:
    """The values under `key` as one array, or a DataError that names the rows whose value is not `good`."""
    try:
        values = np.array([row[key] for row in rows])
        plain = values.dtype.kind in "iuf" and (np.abs(values) < LIMIT).all() and good(values[0].tolist())
        if plain and (good is not _whole or (values == np.floor(values)).all()):
            return values
    except (KeyError, TypeError, ValueError):  # missing, not an object, or ragged
        pass
    bad = [n for n, row in enumerate(rows) if not (isinstance(row, dict) and good(row.get(key)))]
    raise DataError(
        f"{where}: {len(bad)} of {len(rows)} detections have no {what} as {key!r}: number {_some(bad)} (from 0)",
        hint=FORM,
    )
