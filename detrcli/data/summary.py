"""What a split holds, in numbers: for `detr data info` and for the head of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detrcli.data.annotations import Dataset


@dataclass(frozen=True, slots=True)
class Summary:
    images: int
    objects: int
    crowds: int
    empty_images: int
    most_objects: int  # in one image
    small: int  # COCO's bins of area, crowds left out: below 32², below 96², the rest
    medium: int
    large: int
    width: tuple[int, int, int]  # of the images: least, median, greatest; zeros where unknown
    height: tuple[int, int, int]
    classes: dict[str, int]  # objects by class, crowds left out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(dataset: Dataset) -> Summary:
    a = dataset.annotations
    counts = np.diff(a.offsets)
    single = ~a.crowd
    bins = np.bincount(np.digitize(a.areas[single], [32**2, 96**2]), minlength=3).tolist()
    used = np.bincount(a.labels[single], minlength=len(dataset.categories)).tolist()
    return Summary(
        images=len(a),
        objects=int(single.sum()),
        crowds=int(a.crowd.sum()),
        empty_images=int((counts == 0).sum()),
        most_objects=int(counts.max(initial=0)),
        small=bins[0],
        medium=bins[1],
        large=bins[2],
        width=_range(a.sizes[:, 1]),
        height=_range(a.sizes[:, 0]),
        classes=_by_name(dataset.categories.names, used),
    )


def _range(values: Any) -> tuple[int, int, int]:
    known = values[values > 0]
    if not len(known):
        return 0, 0, 0
    return int(known.min()), int(np.median(known)), int(known.max())


def _by_name(names: tuple[str, ...], used: list[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, count in zip(names, used, strict=True):  # two categories may share a name
        counts[name] = counts.get(name, 0) + count
    return counts
