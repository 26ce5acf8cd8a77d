"""What can be wrong with a data set, how bad it is, and what is done about it.

Every reader of a format reports into `Defects`; loading refuses what would falsify training or evaluation, `detr data
check` shows all of it, and `--fix` writes what the repairs left. So there is one list of defects, not one per reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from detrcli.errors import DataError

Severity = Literal["error", "warning", "note"]
NONE = "none"  # what no repair helps
KEPT = 1000  # examples kept of each kind; counts go on


@dataclass(frozen=True, slots=True)
class Kind:
    severity: Severity  # errors make `detr data check` exit with 3
    means: str
    repair: str
    refuse: bool = False  # loading stops, unless bad data is to be skipped


def _fatal(means: str, repair: str) -> Kind:
    return Kind("error", means, repair, refuse=True)


KINDS: dict[str, Kind] = {
    "duplicate-image-id": _fatal("two images share an id: evaluators keep the last one only", "first kept"),
    "bad-image": _fatal("an image entry without a usable id or file name", "dropped"),
    "bad-image-id": Kind(
        "note", "an image id that is not a whole number, in a table", "images numbered by their rows"
    ),
    "duplicate-file": Kind("warning", "two image entries name the same file", "kept"),
    "path-escapes": _fatal("a file name that leaves the folder of the pictures", "dropped"),
    "bad-size": Kind("note", "no usable width and height in the annotation file", "read from the picture"),
    "bad-category": _fatal("a category without a usable id or name", "dropped"),
    "duplicate-category-id": _fatal("two categories share an id", "first kept"),
    "duplicate-category-name": Kind("warning", "two categories share a name", "kept"),
    "class-count": Kind(
        "warning",
        "another number of classes in nc than there are names: the names are the classes",
        "names kept",
    ),
    "empty-category": Kind("note", "a category without objects", "kept"),
    "bad-annotation": _fatal("an annotation that is not a JSON object", "dropped"),
    "bad-annotation-id": _fatal("an annotation id that is not a whole number", "renumbered"),
    "duplicate-annotation-id": _fatal("two annotations share an id: evaluators lose one", "renumbered"),
    "zero-annotation-id": Kind(
        "note", "annotation id 0 or below, which evaluators take for no match", "renumbered"
    ),
    "missing-id": Kind("note", "an annotation without an id", "numbered"),
    "missing-area": Kind("note", "an annotation without an area", "width times height"),
    "missing-iscrowd": Kind("note", "an annotation without iscrowd", "0"),
    "bad-area": Kind("warning", "an area that is not above 0, or larger than its box", "width times height"),
    "bad-iscrowd": Kind("warning", "an iscrowd that is neither 0 nor 1", "0"),
    "unknown-category": _fatal("an object of a category that is not listed", "dropped"),
    "unknown-image": _fatal("an object of an image that is not listed", "dropped"),
    "bad-box": _fatal("a box that is not four numbers", "dropped"),
    "non-finite-box": _fatal("a box with NaN or infinity: evaluators match it with anything", "dropped"),
    "empty-box": Kind(
        "error", "a box without width or height: training drops it, evaluation never matches it", "dropped"
    ),
    "outside-box": Kind("error", "a box wholly outside its picture: training drops it", "dropped"),
    "box-over-edge": Kind(
        "note", "a box that reaches over the edge of its picture: clipped for training", "clipped"
    ),
    "categories-differ": Kind(
        "warning", "a split lists other classes than train: they are matched by name", "one list for all"
    ),
    "unlearned-category": Kind(
        "error",
        "objects of a class that train does not list: no model finds them, so they lower the score",
        "one list for all",
    ),
    "bad-outline": _fatal(
        "an outline that does not decode for its picture", "removed: its box stands for it"
    ),
    "duplicate-object": Kind("warning", "the same class and box twice in one picture", "first kept"),
    "corner-boxes": Kind(
        "note", "boxes that only make sense as corners (x1, y1, x2, y2): read as such", "converted"
    ),
    "empty-image": Kind("note", "an image without objects: a negative example", "kept"),
    "missing-file": _fatal("a picture that is listed but not there", "dropped"),
    "unreadable-image": _fatal("a picture that cannot be decoded", "dropped"),
    "size-differs": _fatal("a picture whose size is not the annotated one", "dropped"),
    "exif-rotated": Kind("note", "a picture that is turned by its EXIF orientation", "kept"),
    "unusual-mode": Kind("note", "a picture that is not 8-bit RGB or grey: it is converted", "kept"),
    "same-image": Kind("warning", "the same picture twice in a split", "kept"),
    "leak": Kind(
        "error",
        "the same picture in two splits: evaluation would see training data",
        "dropped from train",
    ),
    "tiny-box": Kind("note", "a box below one pixel once the picture is resized for the model", "kept"),
    "many-objects": Kind("warning", "more objects in one picture than a model has queries", "kept"),
    "bad-line": _fatal("a line of a label file that cannot be read", "dropped"),
    "bad-xml": _fatal("an annotation file that cannot be read", "dropped"),
    "no-label-file": Kind("note", "a picture without a label file: a negative example", "kept"),
    # consequences of the others, so named last
    "no-objects": _fatal("no object at all: nothing to learn or to evaluate", NONE),
    "no-categories": _fatal("no category at all", NONE),
    "no-images": _fatal("no image at all", NONE),
}


@dataclass(frozen=True, slots=True)
class Defect:
    kind: str
    file: str
    where: str  # "annotation 17", "image 3", "line 4"
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.file} {self.where}".strip()
        return f"{place}: {self.detail}" if self.detail else place


@dataclass(slots=True)
class Defects:
    """Everything found, counted by kind, with the first thousand examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Defect]] = field(default_factory=dict)

    def add(self, kind: str, file: str, where: str = "", detail: str = "") -> None:
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < KEPT:
            kept.append(Defect(kind, file, where, detail))

    def of(self, severity: Severity) -> Iterator[str]:
        """The kinds of one severity that were found."""
        return (kind for kind in KINDS if self.counts[kind] and KINDS[kind].severity == severity)

    @property
    def errors(self) -> int:
        return sum(self.counts[kind] for kind in self.of("error"))

    @property
    def repairable(self) -> bool:
        """Whether a copy would have fewer errors."""
        return any(KINDS[kind].repair != NONE for kind in self.of("error"))

    def refuse(self, check: str, *, skip: bool = False) -> None:
        """Raise the error for what must not be trained or evaluated on, naming the first case and the command that shows all;
        with `skip` only for what cannot be left out."""
        found = [kind for kind in KINDS if self.counts[kind] and KINDS[kind].refuse]
        if skip:
            found = [kind for kind in found if KINDS[kind].repair == NONE]
        if not found:
            return
        first = found[0]
        others = sum(self.counts[kind] for kind in found) - 1
        more = f" (and {others} more)" if others else ""
        way = f"   repair a copy: {check} --fix OUT" if self.repairable else ""
        raise DataError(
            f"{self.examples[first][0]}: {KINDS[first].means}{more}", hint=f"see all: {check}{way}"
        )

    def pictures(self) -> dict[str, str]:
        """The pictures that cannot be used, with the reason."""
        kinds = ("missing-file", "unreadable-image", "size-differs")
        found = (defect for kind in kinds for defect in self.examples.get(kind, ()))
        return {defect.file: defect.detail or KINDS[defect.kind].means for defect in found}

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": name,
                "severity": kind.severity,
                "count": self.counts[name],
                "means": kind.means,
                "repair": kind.repair,
                "examples": [str(example) for example in self.examples[name][:10]],
            }
            for name, kind in KINDS.items()
            if self.counts[name]
        ]

    def merge(self, other: Defects) -> None:
        self.counts.update(other.counts)
        for kind, found in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept.extend(found[: KEPT - len(kept)])
